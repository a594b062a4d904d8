// OpenAI's SDK for JavaScript against a running gateway: base URL and API key from the environment, one line for each passed check.
import assert from 'node:assert/strict';
import { createServer } from 'node:net';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

const baseURL = process.env.GATEWAY_URL;
const options = { apiKey: process.env.GATEWAY_KEY, baseURL, maxRetries: 0 };
const openai = new OpenAI(options);
const messages = [{ role: 'user', content: 'Привет!' }];
const model = 'google/gemini-2.5-flash-lite';

const Weather = z.object({ city: z.string(), degrees: z.number().int(), winds: z.array(z.string()) });
const filledIn = { city: 'text', degrees: 1, winds: ['text'] };
const weather = zodFunction({ name: 'weather', parameters: Weather });
const clock = { type: 'function', function: { name: 'clock', parameters: { type: 'object', properties: {} } } };
const weatherFormat = zodResponseFormat(Weather, 'weather');

const userMessage = (content) => [{ role: 'user', content }];
const withLongPause = userMessage('fault:comments=300'); // a pause of at least a third of a second in the middle
const create = (members, settings) => openai.chat.completions.create({ model, messages, ...members }, settings);

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? '').join('');

async function rejects(promise, kind, status, text) {
  await assert.rejects(promise, (error) => {
    assert.ok(error instanceof kind, `${error.constructor.name}: ${error.message}`);
    assert.equal(error.status, status);
    if (text) assert.match(error.message, text);
    return true;
  });
}

/** A client that counts what it sends. */
function counting(settings) {
  const counter = { sent: 0 };
  counter.openai = new OpenAI({
    ...options,
    ...settings,
    fetch: (...request) => {
      counter.sent += 1;
      return fetch(...request);
    },
  });
  return counter;
}

const checks = {
  async 'a plain completion'() {
    const completion = await create();
    assert.match(completion.choices[0].message.content, /Привет/);
    assert.ok(completion.usage.cost > 0);
  },
  async 'the default model'() {
    const completion = await openai.chat.completions.create({ messages });
    assert.equal(completion.model, model);
  },
  async 'a stream'() {
    const chunks = await collect(await create({ stream: true, stream_options: { include_usage: true } }));
    assert.match(textOf(chunks), /Привет/);
    assert.equal(chunks.at(-1).choices[0].delta.content, '');
    assert.deepEqual(chunks.slice(-2).map((chunk) => chunk.choices[0].finish_reason), ['stop', 'stop']);
    assert.ok(chunks.at(-1).usage.cost > 0);
  },
  async 'the raw response'() {
    const response = await create().asResponse();
    assert.equal(response.status, 200);
    assert.ok(response.headers.get('x-request-id'));
    assert.match(response.headers.get('x-generation-id'), /^gen-/);
  },
  async 'the response with the data'() {
    const { data, response, request_id } = await create().withResponse();
    assert.equal(data.id, response.headers.get('x-generation-id'));
    assert.equal(request_id, response.headers.get('x-request-id'));
    const streamed = await create({ stream: true }).withResponse();
    assert.equal((await collect(streamed.data))[0].id, streamed.response.headers.get('x-generation-id'));
  },
  async 'the request id of the response'() {
    assert.ok((await create())._request_id);
  },
  async 'a stream in two'() {
    const [left, right] = (await create({ stream: true })).tee();
    const [one, other] = await Promise.all([collect(left), collect(right)]);
    assert.deepEqual(one, other);
    assert.match(textOf(one), /Привет/);
  },

  async 'a tool call and its result'() {
    const prompt = userMessage('tool:weather and tool:clock');
    const [first] = (await create({ messages: prompt, tools: [weather, clock] })).choices;
    assert.equal(first.finish_reason, 'tool_calls');
    assert.deepEqual(first.message.tool_calls.map((call) => call.function.name), ['weather', 'clock']);
    assert.deepEqual(JSON.parse(first.message.tool_calls[0].function.arguments), filledIn);
    const results = first.message.tool_calls.map((call) => ({ role: 'tool', tool_call_id: call.id, content: 'minus 40' }));
    const [last] = (await create({ messages: [...prompt, first.message, ...results], tools: [weather, clock] })).choices;
    assert.equal(last.finish_reason, 'stop');
    assert.match(last.message.content, /minus 40/);
  },
  async 'streamed tool calls'() {
    const calls = [];
    const stream = await create({ messages: userMessage('tool:weather tool:clock'), tools: [weather, clock], stream: true });
    for (const chunk of await collect(stream)) {
      for (const call of chunk.choices[0]?.delta.tool_calls ?? []) {
        calls[call.index] ??= { name: call.function.name, arguments: '' };
        calls[call.index].arguments += call.function.arguments;
      }
    }
    assert.deepEqual(calls.map((call) => call.name), ['weather', 'clock']);
    assert.deepEqual(calls.map((call) => JSON.parse(call.arguments)), [filledIn, {}]);
  },
  async 'parse with zod'() {
    const completion = await openai.chat.completions.parse({ model, messages, response_format: weatherFormat });
    assert.deepEqual(completion.choices[0].message.parsed, filledIn);
    const called = await openai.chat.completions.parse({ model, messages, tools: [weather], tool_choice: 'required' });
    assert.deepEqual(called.choices[0].message.tool_calls[0].function.parsed_arguments, filledIn);
  },
  async 'parse rejects structured output that was cut short'() {
    const cut = openai.chat.completions.parse({ model, messages, response_format: weatherFormat, max_tokens: 2 });
    await assert.rejects(cut, OpenAI.LengthFinishReasonError ?? /length/i);
  },
  async 'the stream helper and its events'() {
    const stream = openai.chat.completions.stream({ model, messages, logprobs: true, stream_options: { include_usage: true } });
    const received = { content: '', deltas: '', chunks: 0, done: '', tokens: '' };
    stream.on('content', (delta) => (received.content += delta));
    stream.on('content.delta', ({ delta }) => (received.deltas += delta));
    stream.on('content.done', ({ content }) => (received.done = content));
    stream.on('logprobs.content.done', ({ content }) => (received.tokens = content.map(({ token }) => token).join('')));
    stream.on('chunk', () => (received.chunks += 1));
    const completion = await stream.finalChatCompletion();
    const text = completion.choices[0].message.content;
    assert.match(text, /Привет/);
    assert.deepEqual([received.content, received.deltas, received.done, received.tokens], [text, text, text, text]);
    assert.ok(received.chunks > 10);
    assert.equal(await stream.finalContent(), text);
    assert.ok((await stream.totalUsage()).completion_tokens > 10);
  },
  async 'the stream helper with structured output and a tool'() {
    const structured = openai.chat.completions.stream({ model, messages, response_format: weatherFormat });
    assert.deepEqual((await structured.finalChatCompletion()).choices[0].message.parsed, filledIn);
    const stream = openai.chat.completions.stream({ model, messages: userMessage('use a tool'), tools: [weather] });
    let fragments = '';
    let done = null;
    stream.on('tool_calls.function.arguments.delta', ({ arguments_delta }) => (fragments += arguments_delta));
    stream.on('tool_calls.function.arguments.done', (event) => (done = event));
    const call = (await stream.finalChatCompletion()).choices[0].message.tool_calls[0];
    assert.deepEqual(JSON.parse(fragments), filledIn);
    assert.deepEqual([done.name, done.parsed_arguments], ['weather', filledIn]);
    assert.deepEqual(call.function.parsed_arguments, filledIn);
  },
  async 'the tool runner, plain and streamed'() {
    for (const stream of [false, true]) {
      const calls = [];
      const runner = openai.chat.completions.runTools({
        model,
        stream,
        messages: userMessage('use a tool'),
        tools: [
          zodFunction({
            name: 'weather',
            parameters: Weather,
            function: (parameters) => {
              calls.push(parameters);
              return 'minus 40';
            },
          }),
        ],
      });
      assert.match(await runner.finalContent(), /minus 40/);
      assert.deepEqual(calls, [filledIn]);
      assert.equal(runner.messages.filter((message) => message.role === 'tool').length, 1);
    }
  },

  async 'images, files and audio'() {
    const content = [
      { type: 'text', text: 'Привет!' },
      { type: 'image_url', image_url: { url: 'data:image/png;base64,iVBORw0KGgo=' } },
      { type: 'file', file: { filename: 'a.pdf', file_data: 'data:application/pdf;base64,JVBERi0=' } },
      { type: 'input_audio', input_audio: { format: 'wav', data: 'UklGRg==' } },
    ];
    assert.match((await create({ messages: userMessage(content) })).choices[0].message.content, /Привет/);
  },
  async 'parameters that do not change the text'() {
    const members = { seed: 7, stop: ['\n'], temperature: 0, top_p: 0.5, logit_bias: { 50256: -100 }, user: 'Ваня', verbosity: 'low' };
    assert.match((await create(members)).choices[0].message.content, /Привет/);
  },
  async 'parameters that change the response'() {
    const completion = await create({ n: 2, max_tokens: 3, logprobs: true, top_logprobs: 2, service_tier: 'flex' });
    assert.deepEqual(completion.choices.map((choice) => choice.index), [0, 1]);
    assert.deepEqual(completion.choices.map((choice) => choice.finish_reason), ['length', 'length']);
    assert.equal(completion.choices[0].logprobs.content[0].top_logprobs.length, 2);
    assert.equal(completion.service_tier, 'flex');
  },
  async 'fields that OpenAI does not have'() {
    const other = 'meta-llama/llama-3.1-8b-instruct';
    const extra = { models: [other], reasoning: { effort: 'low' }, provider: { sort: 'price' } };
    const completion = await create({ messages: userMessage('fault:primary-down'), ...extra });
    assert.equal(completion.model, other);
    assert.ok(completion.choices[0].message.reasoning);
    assert.ok(completion.usage.completion_tokens_details.reasoning_tokens > 0);
  },

  async 'an abort before the response'() {
    const controller = new AbortController();
    const request = create({ messages: userMessage('fault:slow=2') }, { signal: controller.signal });
    setTimeout(() => controller.abort(), 50);
    await assert.rejects(request, OpenAI.APIUserAbortError);
  },
  async 'an abort of a stream'() {
    const controller = new AbortController();
    for (const abort of [(stream) => stream.controller.abort(), () => controller.abort()]) {
      const stream = await create({ messages: withLongPause, stream: true }, { signal: controller.signal });
      const chunks = [];
      for await (const chunk of stream) {
        chunks.push(chunk);
        if (chunks.length === 3) abort(stream);
      }
      assert.ok(chunks.length >= 3);
      assert.ok(chunks.every((chunk) => chunk.choices[0]?.finish_reason === null), 'the stream was not aborted');
      assert.ok(stream.controller.signal.aborted);
    }
  },
  async 'leaving the loop over a stream'() {
    const stream = await create({ stream: true });
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      break;
    }
    assert.ok(stream.controller.signal.aborted);
  },
  async 'an abort of the stream helper'() {
    const stream = openai.chat.completions.stream({ model, messages: withLongPause });
    stream.on('content', () => stream.abort());
    await assert.rejects(stream.finalChatCompletion(), OpenAI.APIUserAbortError);
    assert.ok(stream.aborted);
  },
  async 'a timeout'() {
    for (const stream of [false, true]) {
      const request = create({ messages: userMessage('fault:slow=1'), stream }, { timeout: 200 });
      await assert.rejects(request, OpenAI.APIConnectionTimeoutError);
    }
  },
  async 'a 429 is retried'() {
    const client = counting({ maxRetries: 1 });
    const request = client.openai.chat.completions.create({ model, messages: userMessage('fault:status=429:0') });
    await rejects(request, OpenAI.RateLimitError, 429, /overloaded/);
    assert.equal(client.sent, 2);
  },
  async 'a response that may have been charged is not retried'() {
    const client = counting({ maxRetries: 3 });
    const request = client.openai.chat.completions.create({ model, messages: userMessage('fault:cut-inside=0') });
    await rejects(request, OpenAI.InternalServerError, 500);
    assert.equal(client.sent, 1);
  },
  async 'insufficient balance is not retried'() {
    const client = counting({ apiKey: process.env.GATEWAY_POOR_KEY, maxRetries: 3 });
    await rejects(client.openai.chat.completions.create({ model, messages }), OpenAI.APIError, 402, /Insufficient balance/);
    assert.equal(client.sent, 1);
  },

  async 'AuthenticationError'() {
    const unauthenticated = new OpenAI({ ...options, apiKey: 'sk-user-nobody' });
    const request = unauthenticated.chat.completions.create({ model, messages });
    await rejects(request, OpenAI.AuthenticationError, 401, /Invalid API key or inactive user/);
  },
  async 'BadRequestError'() {
    await rejects(create({ messages: [] }), OpenAI.BadRequestError, 400, /messages array is required/);
    await rejects(create({ model: 'no/such' }), OpenAI.BadRequestError, 400, /no\/such/);
  },
  async 'PermissionDeniedError'() {
    await rejects(create({ messages: userMessage('fault:status=403') }), OpenAI.PermissionDeniedError, 403, /Simulated error 403/);
  },
  async 'NotFoundError'() {
    await rejects(openai.models.retrieve('no/such'), OpenAI.NotFoundError, 404, /Model not found/);
  },
  async 'ConflictError and UnprocessableEntityError'() {
    const client = counting({ maxRetries: 3 });
    const headers = { 'Idempotency-Key': `order-${process.hrtime.bigint()}` };
    const send = (content) => client.openai.chat.completions.create({ model, messages: userMessage(content) }, { headers });
    await send('Привет!');
    await rejects(send('Привет!'), OpenAI.ConflictError, 409, /already made/);
    await rejects(send('Hello'), OpenAI.UnprocessableEntityError, 422, /different request/);
    assert.equal(client.sent, 3);
  },
  async 'RateLimitError'() {
    await rejects(create({ messages: userMessage('fault:status=429:300') }), OpenAI.RateLimitError, 429, /overloaded/);
  },
  async 'InternalServerError'() {
    await rejects(create({ messages: userMessage('fault:status=500') }), OpenAI.InternalServerError, 500, /Internal server error/);
  },
  async 'APIConnectionError'() {
    const server = createServer().listen(0, '127.0.0.1');
    await new Promise((resolve) => server.once('listening', resolve));
    const { port } = server.address();
    await new Promise((resolve) => server.close(resolve));
    const client = new OpenAI({ ...options, baseURL: `http://127.0.0.1:${port}/v1` });
    await assert.rejects(client.chat.completions.create({ model, messages }), OpenAI.APIConnectionError);
  },
  async 'an APIError if a stream is interrupted'() {
    for (const fault of ['cut=1', 'cut=4', 'error=1', 'error=5', 'string-code=5']) {
      const stream = await create({ messages: userMessage(`fault:${fault}`), stream: true });
      await assert.rejects(collect(stream), (error) => error instanceof OpenAI.APIError && /lost|disconnected/.test(error.message));
    }
  },
  async 'an error if a stream is interrupted inside an event'() {
    const muted = new OpenAI({ ...options, logLevel: 'off' });
    for (const fault of ['cut-inside=1', 'cut-inside=5', 'cut-inside=20']) {
      const stream = await muted.chat.completions.create({ model, messages: userMessage(`fault:${fault}`), stream: true });
      await assert.rejects(collect(stream));
      await assert.rejects(muted.chat.completions.stream({ model, messages: userMessage(`fault:${fault}`) }).finalChatCompletion());
    }
  },
  async 'streams of unusual format are complete'() {
    for (const fault of ['usage-twice', 'usage-early', 'usage-in-finish', 'injected', 'chunks=3', 'one-write', 'comments=20']) {
      const chunks = await collect(await create({ messages: userMessage(`Привет! fault:${fault}`), stream: true }));
      assert.match(textOf(chunks), /Вы написали/, fault);
      assert.ok(chunks.findLast((chunk) => chunk.usage).usage.cost > 0, fault);
    }
  },
  async 'a plain response that failed'() {
    const [choice] = (await create({ messages: userMessage('fault:plain-error') })).choices;
    assert.deepEqual([choice.finish_reason, choice.error.code], ['error', 502]);
  },

  async 'the list of models'() {
    const models = [];
    for await (const entry of openai.models.list()) models.push(entry.id);
    assert.equal(models.length, 326);
    assert.equal((await openai.models.retrieve(model)).id, model);
  },
};

for (const [name, check] of Object.entries(checks)) {
  try {
    await check();
  } catch (error) {
    throw new Error(name, { cause: error });
  }
  console.log(`ok ${name}`);
}

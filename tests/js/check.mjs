// OpenAI's SDK for JavaScript against a running gateway: base URL and key in the environment, one line for each thing that works.
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
const weatherForm = zodResponseFormat(Weather, 'weather');

const says = (content) => [{ role: 'user', content }];
const inTwoHalves = says('fault:comments=300'); // a third of a second between them, and more
const create = (members, settings) => openai.chat.completions.create({ model, messages, ...members }, settings);

async function collect(stream) {
  const chunks = [];
  for await (const chunk of stream) chunks.push(chunk);
  return chunks;
}

const textOf = (chunks) => chunks.map((chunk) => chunk.choices[0]?.delta?.content ?? '').join('');

async function refused(promise, kind, status, text) {
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
    assert.deepEqual(chunks.at(-1).choices, []);
    assert.ok(chunks.at(-1).usage.cost > 0);
  },
  async 'the raw response'() {
    const response = await create().asResponse();
    assert.equal(response.status, 200);
    assert.ok(response.headers.get('x-request-id'));
    assert.match(response.headers.get('x-generation-id'), /^gen-/);
  },
  async 'the response beside the data'() {
    const { data, response, request_id } = await create().withResponse();
    assert.equal(data.id, response.headers.get('x-generation-id'));
    assert.equal(request_id, response.headers.get('x-request-id'));
    const streamed = await create({ stream: true }).withResponse();
    assert.equal((await collect(streamed.data))[0].id, streamed.response.headers.get('x-generation-id'));
  },
  async 'the request id on the answer'() {
    assert.ok((await create())._request_id);
  },
  async 'a stream in two'() {
    const [left, right] = (await create({ stream: true })).tee();
    const [one, other] = await Promise.all([collect(left), collect(right)]);
    assert.deepEqual(one, other);
    assert.match(textOf(one), /Привет/);
  },

  async 'a tool that is called, answered and spoken of'() {
    const asked = says('tool:weather and tool:clock');
    const [first] = (await create({ messages: asked, tools: [weather, clock] })).choices;
    assert.equal(first.finish_reason, 'tool_calls');
    assert.deepEqual(first.message.tool_calls.map((call) => call.function.name), ['weather', 'clock']);
    assert.deepEqual(JSON.parse(first.message.tool_calls[0].function.arguments), filledIn);
    const answers = first.message.tool_calls.map((call) => ({ role: 'tool', tool_call_id: call.id, content: 'minus 40' }));
    const [last] = (await create({ messages: [...asked, first.message, ...answers], tools: [weather, clock] })).choices;
    assert.equal(last.finish_reason, 'stop');
    assert.match(last.message.content, /minus 40/);
  },
  async 'streamed tool calls'() {
    const calls = [];
    const stream = await create({ messages: says('tool:weather tool:clock'), tools: [weather, clock], stream: true });
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
    const completion = await openai.chat.completions.parse({ model, messages, response_format: weatherForm });
    assert.deepEqual(completion.choices[0].message.parsed, filledIn);
    const called = await openai.chat.completions.parse({ model, messages, tools: [weather], tool_choice: 'required' });
    assert.deepEqual(called.choices[0].message.tool_calls[0].function.parsed_arguments, filledIn);
  },
  async 'parse refuses a form that was cut short'() {
    const cut = openai.chat.completions.parse({ model, messages, response_format: weatherForm, max_tokens: 2 });
    await assert.rejects(cut, OpenAI.LengthFinishReasonError ?? /length/i);
  },
  async 'the stream helper and its events'() {
    const stream = openai.chat.completions.stream({ model, messages, logprobs: true, stream_options: { include_usage: true } });
    const heard = { content: '', deltas: '', chunks: 0, done: '', tokens: '' };
    stream.on('content', (delta) => (heard.content += delta));
    stream.on('content.delta', ({ delta }) => (heard.deltas += delta));
    stream.on('content.done', ({ content }) => (heard.done = content));
    stream.on('logprobs.content.done', ({ content }) => (heard.tokens = content.map(({ token }) => token).join('')));
    stream.on('chunk', () => (heard.chunks += 1));
    const completion = await stream.finalChatCompletion();
    const text = completion.choices[0].message.content;
    assert.match(text, /Привет/);
    assert.deepEqual([heard.content, heard.deltas, heard.done, heard.tokens], [text, text, text, text]);
    assert.ok(heard.chunks > 10);
    assert.equal(await stream.finalContent(), text);
    assert.ok((await stream.totalUsage()).completion_tokens > 10);
  },
  async 'the stream helper with a form and a tool'() {
    const form = openai.chat.completions.stream({ model, messages, response_format: weatherForm });
    assert.deepEqual((await form.finalChatCompletion()).choices[0].message.parsed, filledIn);
    const stream = openai.chat.completions.stream({ model, messages: says('use a tool'), tools: [weather] });
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
      const given = [];
      const runner = openai.chat.completions.runTools({
        model,
        stream,
        messages: says('use a tool'),
        tools: [
          zodFunction({
            name: 'weather',
            parameters: Weather,
            function: (form) => {
              given.push(form);
              return 'minus 40';
            },
          }),
        ],
      });
      assert.match(await runner.finalContent(), /minus 40/);
      assert.deepEqual(given, [filledIn]);
      assert.equal(runner.messages.filter((message) => message.role === 'tool').length, 1);
    }
  },

  async 'images, files and sounds'() {
    const content = [
      { type: 'text', text: 'Привет!' },
      { type: 'image_url', image_url: { url: 'data:image/png;base64,iVBORw0KGgo=' } },
      { type: 'file', file: { filename: 'a.pdf', file_data: 'data:application/pdf;base64,JVBERi0=' } },
      { type: 'input_audio', input_audio: { format: 'wav', data: 'UklGRg==' } },
    ];
    assert.match((await create({ messages: says(content) })).choices[0].message.content, /Привет/);
  },
  async 'parameters that change no word'() {
    const members = { seed: 7, stop: ['\n'], temperature: 0, top_p: 0.5, logit_bias: { 50256: -100 }, user: 'Ваня', verbosity: 'low' };
    assert.match((await create(members)).choices[0].message.content, /Привет/);
  },
  async 'parameters that change the answer'() {
    const completion = await create({ n: 2, max_tokens: 3, logprobs: true, top_logprobs: 2, service_tier: 'flex' });
    assert.deepEqual(completion.choices.map((choice) => choice.index), [0, 1]);
    assert.deepEqual(completion.choices.map((choice) => choice.finish_reason), ['length', 'length']);
    assert.equal(completion.choices[0].logprobs.content[0].top_logprobs.length, 2);
    assert.equal(completion.service_tier, 'flex');
  },
  async 'fields that OpenAI does not know'() {
    const other = 'meta-llama/llama-3.1-8b-instruct';
    const extra = { models: [other], reasoning: { effort: 'low' }, provider: { sort: 'price' } };
    const completion = await create({ messages: says('fault:primary-down'), ...extra });
    assert.equal(completion.model, other);
    assert.ok(completion.choices[0].message.reasoning);
    assert.ok(completion.usage.completion_tokens_details.reasoning_tokens > 0);
  },

  async 'an abort before the answer'() {
    const controller = new AbortController();
    const asked = create({ messages: says('fault:slow=2') }, { signal: controller.signal });
    setTimeout(() => controller.abort(), 50);
    await assert.rejects(asked, OpenAI.APIUserAbortError);
  },
  async 'an abort of a stream'() {
    const controller = new AbortController();
    for (const abort of [(stream) => stream.controller.abort(), () => controller.abort()]) {
      const stream = await create({ messages: inTwoHalves, stream: true }, { signal: controller.signal });
      const chunks = [];
      for await (const chunk of stream) {
        chunks.push(chunk);
        if (chunks.length === 3) abort(stream);
      }
      assert.ok(chunks.length >= 3);
      assert.ok(chunks.every((chunk) => chunk.choices[0]?.finish_reason === null), 'it went on to its end');
      assert.ok(stream.controller.signal.aborted);
    }
  },
  async 'a loop that is left'() {
    const stream = await create({ stream: true });
    for await (const chunk of stream) {
      assert.ok(chunk.id);
      break;
    }
    assert.ok(stream.controller.signal.aborted);
  },
  async 'an abort of the stream helper'() {
    const stream = openai.chat.completions.stream({ model, messages: inTwoHalves });
    stream.on('content', () => stream.abort());
    await assert.rejects(stream.finalChatCompletion(), OpenAI.APIUserAbortError);
    assert.ok(stream.aborted);
  },
  async 'a timeout'() {
    for (const stream of [false, true]) {
      const asked = create({ messages: says('fault:slow=1'), stream }, { timeout: 200 });
      await assert.rejects(asked, OpenAI.APIConnectionTimeoutError);
    }
  },
  async 'a 429 is asked again'() {
    const client = counting({ maxRetries: 1 });
    const asked = client.openai.chat.completions.create({ model, messages: says('fault:status=429:0') });
    await refused(asked, OpenAI.RateLimitError, 429, /overloaded/);
    assert.equal(client.sent, 2);
  },
  async 'an answer that may be paid is not asked again'() {
    const client = counting({ maxRetries: 3 });
    const asked = client.openai.chat.completions.create({ model, messages: says('fault:cut-inside=0') });
    await refused(asked, OpenAI.InternalServerError, 500);
    assert.equal(client.sent, 1);
  },
  async 'a poor caller is not asked again'() {
    const client = counting({ apiKey: process.env.GATEWAY_POOR_KEY, maxRetries: 3 });
    await refused(client.openai.chat.completions.create({ model, messages }), OpenAI.APIError, 402, /Insufficient balance/);
    assert.equal(client.sent, 1);
  },

  async 'AuthenticationError'() {
    const stranger = new OpenAI({ ...options, apiKey: 'sk-user-nobody' });
    const asked = stranger.chat.completions.create({ model, messages });
    await refused(asked, OpenAI.AuthenticationError, 401, /Invalid API key or inactive user/);
  },
  async 'BadRequestError'() {
    await refused(create({ messages: [] }), OpenAI.BadRequestError, 400, /messages array is required/);
    await refused(create({ model: 'no/such' }), OpenAI.BadRequestError, 400, /no\/such/);
  },
  async 'PermissionDeniedError'() {
    await refused(create({ messages: says('fault:status=403') }), OpenAI.PermissionDeniedError, 403, /Simulated error 403/);
  },
  async 'NotFoundError'() {
    await refused(openai.models.retrieve('no/such'), OpenAI.NotFoundError, 404, /Model not found/);
  },
  async 'ConflictError and UnprocessableEntityError'() {
    const client = counting({ maxRetries: 3 });
    const headers = { 'Idempotency-Key': `order-${process.hrtime.bigint()}` };
    const ask = (content) => client.openai.chat.completions.create({ model, messages: says(content) }, { headers });
    await ask('Привет!');
    await refused(ask('Привет!'), OpenAI.ConflictError, 409, /made before/);
    await refused(ask('Hello'), OpenAI.UnprocessableEntityError, 422, /different request/);
    assert.equal(client.sent, 3);
  },
  async 'RateLimitError'() {
    await refused(create({ messages: says('fault:status=429:300') }), OpenAI.RateLimitError, 429, /overloaded/);
  },
  async 'InternalServerError'() {
    await refused(create({ messages: says('fault:status=500') }), OpenAI.InternalServerError, 500, /Internal server error/);
  },
  async 'APIConnectionError'() {
    const server = createServer().listen(0, '127.0.0.1');
    await new Promise((resolve) => server.once('listening', resolve));
    const { port } = server.address();
    await new Promise((resolve) => server.close(resolve));
    const client = new OpenAI({ ...options, baseURL: `http://127.0.0.1:${port}/v1` });
    await assert.rejects(client.chat.completions.create({ model, messages }), OpenAI.APIConnectionError);
  },
  async 'an APIError where a stream breaks off'() {
    for (const fault of ['cut=1', 'cut=4', 'error=1', 'error=5', 'string-code=5']) {
      const stream = await create({ messages: says(`fault:${fault}`), stream: true });
      await assert.rejects(collect(stream), (error) => error instanceof OpenAI.APIError && /lost|disconnected/.test(error.message));
    }
  },
  async 'an error where a stream breaks off inside an event'() {
    const muted = new OpenAI({ ...options, logLevel: 'off' });
    for (const fault of ['cut-inside=1', 'cut-inside=5', 'cut-inside=20']) {
      const stream = await muted.chat.completions.create({ model, messages: says(`fault:${fault}`), stream: true });
      await assert.rejects(collect(stream));
      await assert.rejects(muted.chat.completions.stream({ model, messages: says(`fault:${fault}`) }).finalChatCompletion());
    }
  },
  async 'streams of odd form are whole answers'() {
    for (const fault of ['usage-twice', 'usage-early', 'usage-in-finish', 'injected', 'chunks=3', 'one-write', 'comments=20']) {
      const chunks = await collect(await create({ messages: says(`Привет! fault:${fault}`), stream: true }));
      assert.match(textOf(chunks), /Вы написали/, fault);
      assert.ok(chunks.findLast((chunk) => chunk.usage).usage.cost > 0, fault);
    }
  },
  async 'a plain answer that failed'() {
    const [choice] = (await create({ messages: says('fault:plain-error') })).choices;
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

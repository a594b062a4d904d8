// The JavaScript clients of record.py, which starts this with the server's URL and the directory in the environment, and the cases of
// requests.json on stdin.
import { existsSync, readFileSync } from 'node:fs';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { AIMessage, ChatMessage, FunctionMessage, HumanMessage, SystemMessage, ToolMessage } from '@langchain/core/messages';
import { tool as langchainTool } from '@langchain/core/tools';
import { ChatOpenAI } from '@langchain/openai';
import { createOpenRouter } from '@openrouter/ai-sdk-provider';
import { generateText, jsonSchema, Output, streamText, tool } from 'ai';
import OpenAI from 'openai';
import { zodFunction, zodResponseFormat } from 'openai/helpers/zod';
import { z } from 'zod';

globalThis.AI_SDK_LOG_WARNINGS = false;
const { RECORDER: url, KEY: apiKey, OUTDIR } = process.env;
const requests = JSON.parse(readFileSync(0, 'utf8'));
const model = 'google/gemini-2.5-flash-lite';
const hello = [{ role: 'user', content: 'Hello' }];
const user = 'ivan.petrov@example.com';
const contentOf = (name) => requests[name].messages[0].content;
const part = (name) => requests[name].messages[0].content[1];
const base64 = (uri) => uri.split(',')[1];
const png = part('image-data').image_url.url;
const pdf = part('file-data').file.file_data;
const wav = part('audio').input_audio.data;
const City = z.object({ name: z.string().describe('in its own language'), population: z.number().int().nullable() });
const Place = z.object({ city: z.string(), unit: z.enum(['celsius', 'fahrenheit']).default('celsius') });
// Nobody but the recorder is asked: where a client wants something else of the network, it gets a picture.
const { fetch } = globalThis;
globalThis.fetch = async (where, how) =>
  String(where.url ?? where).startsWith(url)
    ? fetch(where, how)
    : new Response(Buffer.from(base64(png), 'base64'), { headers: { 'Content-Type': 'image/png' } });
const texts = ['unicode', 'escapes', 'long', ...Object.keys(requests).filter((name) => /^surrogate-(?!in-tool)/.test(name))];

async function drained(stream) {
  for await (const chunk of await stream) void chunk;
}

function openaiNode() {
  const at = (name) => new OpenAI({ baseURL: `${url}/openai-node/${name}`, apiKey, maxRetries: 0 }).chat.completions;
  const create = async (name, members) => {
    const response = await at(name).create(members);
    if (members.stream) await drained(response);
  };
  return {
    ...Object.fromEntries(Object.entries(requests).map(([name, members]) => [name, () => create(name, members)])),
    'model-undefined': () => create('model-undefined', { model: undefined, messages: hello }),
    'surrogate-beside-noncharacter': () =>
      create('surrogate-beside-noncharacter', { model, messages: [{ role: 'user', content: '\ud83d \ufdd0' }] }),
    'cut-in-javascript': () => create('cut-in-javascript', { model, messages: [{ role: 'user', content: 'Hi 👋🏽'.slice(0, 4) }] }),
    'numbers-of-javascript': () =>
      create('numbers-of-javascript', { model, messages: hello, temperature: 0.1 + 0.2, top_p: 1e-7, x: [1e21, -0, NaN, 2 ** 53] }),
    zod: () => at('zod').parse({ model, messages: hello, response_format: zodResponseFormat(City, 'city') }),
    'zod-tool': () => at('zod-tool').parse({ model, messages: hello, tools: [zodFunction({ name: 'city', parameters: City })] }),
    'stream-helper': () => at('stream-helper').stream({ model, messages: hello, user }).done(),
    'run-tools': () =>
      at('run-tools')
        .runTools({
          model,
          messages: hello,
          tools: [
            { type: 'function', function: { name: 'f', parameters: { type: 'object', properties: {} }, parse: JSON.parse, function: () => 1 } },
          ],
        })
        .done(),
  };
}

function langchainNode() {
  const at = (name, members = {}) =>
    new ChatOpenAI({ model, apiKey, maxRetries: 0, configuration: { baseURL: `${url}/langchain-node/${name}` }, ...members });
  const weather = langchainTool(() => '21', { name: 'get_weather', description: 'The weather of a city', schema: Place });
  const call = new AIMessage({ content: '', tool_calls: [{ name: 'get_weather', args: { city: 'Париж' }, id: 'call_1' }] });
  const turn = [new HumanMessage('Weather?'), call, new ToolMessage({ content: '21', tool_call_id: 'call_1' })];
  const settings = {
    plain: {},
    sampling: { temperature: 1.0, topP: 1e-7, frequencyPenalty: 0.1 + 0.2, n: 2 },
    stop: { stop: ['END', '\u2028'] },
    'max-tokens': { maxTokens: 16 },
    'max-completion-tokens': { maxCompletionTokens: 16 },
    logprobs: { logprobs: true, topLogprobs: 3 },
    'logit-bias': { logitBias: { 50256: -100 } },
    user: { user },
    reasoning: { reasoning: { effort: 'low' }, verbosity: 'low' },
    tier: { service_tier: 'flex', promptCacheKey: 'k' },
    'model-kwargs': { modelKwargs: { provider: { sort: 'price' }, usage: { include: true }, models: [model], transforms: [], seed: 7 } },
    'stream-by-setting': { streaming: true },
  };
  const messages = {
    conversation: [
      new SystemMessage('Be brief.'),
      new HumanMessage({ content: 'Hello', name: 'Ivan' }),
      new AIMessage('Hi'),
      new HumanMessage('Again'),
    ],
    developer: [new ChatMessage('Be brief.', 'developer'), new HumanMessage('Hello')],
    'tool-turn': turn,
    functions: [
      new AIMessage({ content: '', additional_kwargs: { function_call: { name: 'get_weather', arguments: '{}' } } }),
      new FunctionMessage({ content: '21', name: 'get_weather' }),
    ],
    parts: [new HumanMessage({ content: [{ type: 'text', text: '?' }, part('image-data'), part('file-data'), part('audio')] })],
    image: [new HumanMessage({ content: [{ type: 'image', source_type: 'base64', data: base64(png), mime_type: 'image/png' }] })],
    file: [
      new HumanMessage({
        content: [
          { type: 'file', source_type: 'base64', data: base64(pdf), mime_type: 'application/pdf', metadata: { filename: 'a.pdf' } },
        ],
      }),
    ],
    'cache-control': [new SystemMessage({ content: [{ type: 'text', text: 'Rules.', cache_control: { type: 'ephemeral' } }] }), ...turn],
    empty: [new HumanMessage(''), new AIMessage(''), new HumanMessage({ content: [] })],
    ...Object.fromEntries(texts.map((name) => [name, [new HumanMessage(contentOf(name))]])),
  };
  const tools = {
    tools: {},
    'tools-strict': { strict: true },
    'tools-not-parallel': { parallel_tool_calls: false },
    'tool-choice-any': { tool_choice: 'any' },
    'tool-choice-named': { tool_choice: 'get_weather' },
    'call-options': { stop: ['x'], user, seed: 42, response_format: { type: 'json_object' } },
  };
  return {
    ...Object.fromEntries(Object.entries(settings).map(([name, members]) => [name, () => at(name, members).invoke('Hello')])),
    ...Object.fromEntries(Object.entries(messages).map(([name, given]) => [name, () => at(name).invoke(given)])),
    ...Object.fromEntries(Object.entries(tools).map(([name, how]) => [name, () => at(name).bindTools([weather], how).invoke('Hi')])),
    ...Object.fromEntries(
      ['jsonSchema', 'jsonMode', 'functionCalling'].map((method) => [
        `structured-${method}`,
        () => at(`structured-${method}`).withStructuredOutput(City, { method, name: 'city' }).invoke('Paris'),
      ]),
    ),
    stream: () => drained(at('stream').stream('Hello')),
    'stream-without-usage': () => drained(at('stream-without-usage', { streamUsage: false }).stream('Hello')),
  };
}

// Vercel's AI SDK, with any of its providers. `own` are options of the provider, by case.
function aiSdk(at, own) {
  const weather = tool({ description: 'The weather of a city', inputSchema: Place });
  const free = tool({ inputSchema: jsonSchema({ type: 'object', additionalProperties: true }) });
  const talk = (...content) => ({ messages: [{ role: 'user', content }] });
  const text = { type: 'text', text: 'What is it?' };
  const call = { type: 'tool-call', toolCallId: 'call_1', toolName: 'weather', input: { city: 'Париж', unit: null } };
  const result = (output) => ({ type: 'tool-result', toolCallId: 'call_1', toolName: 'weather', output });
  const turn = (output, ...before) => ({
    messages: [...hello, { role: 'assistant', content: [...before, call] }, { role: 'tool', content: [result(output)] }],
    tools: { weather },
  });
  const cached = Object.fromEntries(['openaiCompatible', 'openrouter'].map((key) => [key, { cacheControl: { type: 'ephemeral' } }]));
  const calls = {
    plain: {},
    instructions: { instructions: 'Be brief.' },
    conversation: { messages: [...hello, { role: 'assistant', content: 'Hi' }, ...talk(text, text).messages] },
    sampling: { temperature: 1.0, topP: 1e-7, topK: 40, presencePenalty: 0.1 + 0.2, frequencyPenalty: -0.5, seed: 42 },
    'max-tokens': { maxOutputTokens: 16 },
    stop: { stopSequences: ['END', '\u2028'] },
    tools: { tools: { weather, free } },
    'tool-choice-none': { tools: { weather }, toolChoice: 'none' },
    'tool-choice-required': { tools: { weather }, toolChoice: 'required' },
    'tool-choice-named': { tools: { weather }, toolChoice: { type: 'tool', toolName: 'weather' } },
    'tool-strict': { tools: { weather: tool({ inputSchema: Place, strict: true }) } },
    'tool-turn': turn({ type: 'json', value: { temperature: 21.5 } }),
    'tool-turn-text': turn({ type: 'text', value: '' }, { type: 'text', text: 'Let me see.' }),
    'tool-turn-content': turn({ type: 'content', value: [text] }),
    'reasoning-turn': turn({ type: 'error-text', value: 'No such city' }, { type: 'reasoning', text: 'Hm …' }),
    object: { output: Output.object({ schema: City }) },
    'object-named': { output: Output.object({ schema: City, name: 'city', description: 'A city' }) },
    array: { output: Output.array({ element: City }) },
    choice: { output: Output.choice({ options: ['yes', 'no'] }) },
    json: { output: Output.json() },
    image: talk(text, { type: 'image', image: png }),
    'image-url': talk(text, { type: 'image', image: new URL('https://example.com/a%20b.png?c=d') }),
    'image-bytes': talk(text, { type: 'file', data: Buffer.from(base64(png), 'base64'), mediaType: 'image/png' }),
    file: talk(text, { type: 'file', data: base64(pdf), mediaType: 'application/pdf', filename: 'отчёт.pdf' }),
    audio: talk(text, { type: 'file', data: wav, mediaType: 'audio/wav' }),
    'cache-control': { messages: [{ role: 'user', content: [{ ...text, providerOptions: cached }, text], providerOptions: cached }] },
    empty: { messages: [{ role: 'user', content: '' }, { role: 'assistant', content: '' }, ...hello] },
    headers: { headers: { 'X-Own': '1' } },
    ...Object.fromEntries(texts.map((name) => [name, { prompt: contentOf(name) }])),
    ...Object.fromEntries(Object.entries(own).map(([name, providerOptions]) => [name, { providerOptions }])),
  };
  const input = (members) => ('messages' in members ? members : { prompt: 'Hello', ...members });
  const options = (name, members) => ({ model: at(name), maxRetries: 0, ...input(members) });
  return {
    ...Object.fromEntries(Object.entries(calls).map(([name, members]) => [name, () => generateText(options(name, members))])),
    stream: () => drained(streamText(options('stream', {})).textStream),
    'stream-tools': () => drained(streamText(options('stream-tools', calls.tools)).textStream),
    'stream-object': () => drained(streamText(options('stream-object', calls.object)).textStream),
  };
}

const clients = {
  'openai-node': openaiNode,
  'langchain-node': langchainNode,
  'ai-sdk-openai': () =>
    aiSdk((name) => createOpenAI({ baseURL: `${url}/ai-sdk-openai/${name}`, apiKey }).chat(model), {
      user: { openai: { user } },
      'logit-bias': { openai: { logitBias: { 50256: -100 }, logprobs: 3 } },
      'not-parallel': { openai: { parallelToolCalls: false, store: false, metadata: { a: 'b' }, serviceTier: 'auto' } },
      reasoning: { openai: { reasoningEffort: 'low', forceReasoning: true, maxCompletionTokens: 32, textVerbosity: 'low' } },
      prediction: { openai: { prediction: { type: 'content', content: 'x' }, promptCacheKey: 'k', safetyIdentifier: 's' } },
    }),
  'ai-sdk-openai-compatible': () =>
    aiSdk(
      (name) => {
        const baseURL = `${url}/ai-sdk-openai-compatible/${name}`;
        const settings = { name: 'gptutor', baseURL, apiKey, includeUsage: true, supportsStructuredOutputs: name !== 'json' };
        return createOpenAICompatible(settings)(model);
      },
      {
        user: { gptutor: { user } },
        reasoning: { gptutor: { reasoningEffort: 'low', textVerbosity: 'high' } },
        'extra-body': { gptutor: { provider: { sort: 'price' }, usage: { include: true }, models: [model], plugins: [], route: null } },
      },
    ),
  'ai-sdk-openrouter': () =>
    aiSdk(
      (name) => {
        const openrouter = createOpenRouter({ baseURL: `${url}/ai-sdk-openrouter/${name}`, apiKey, appName: 'Ivan', appUrl: 'https://i.example' });
        const settings = {
          user: { user, logprobs: 3, logitBias: { 50256: -100 }, parallelToolCalls: false },
          reasoning: { reasoning: { effort: 'low' }, includeReasoning: true, usage: { include: true } },
          settings: {
            models: [model],
            provider: { sort: 'price', max_price: { prompt: '0.5', completion: 1.5 } },
            plugins: [{ id: 'web', max_results: 2 }],
            web_search_options: { max_results: 1 },
            cache_control: { type: 'ephemeral', ttl: '1h' },
            extraBody: { transforms: ['middle-out'], x: 1e-7 },
          },
        };
        return openrouter.chat(model, settings[name]);
      },
      {
        user: {},
        settings: {},
        reasoning: { openrouter: { reasoning: { max_tokens: 1000 } } },
        'extra-body': { openrouter: { provider: { order: ['Google'] }, usage: { include: true }, transforms: [] } },
      },
    ),
};

for (const client of process.argv.slice(2)) {
  for (const [name, play] of Object.entries(clients[client]())) {
    try {
      await play();
    } catch (error) {
      // Errors after the body was recorded are about the recorder's response, and are ignored.
      if (!existsSync(`${OUTDIR}/${client}/${name}.json`)) console.log(`${client}/${name}: not recorded: ${error}`.slice(0, 200));
    }
  }
}

// What clients other than OpenAI's SDK make of the gateway's errors; prints one JSON document, by client and situation.
import { createServer } from 'node:http';
import { createOpenAI } from '@ai-sdk/openai';
import { createOpenAICompatible } from '@ai-sdk/openai-compatible';
import { createOpenRouter } from '@openrouter/ai-sdk-provider';
import { OpenRouter } from '@openrouter/sdk';
import { generateText, streamText } from 'ai';
import OpenAI from 'openai';

const REQUESTS_MAX = 4; // a client that has sent so many would go on
const model = 'google/gemini-2.5-flash-lite';
const messagesOf = (content) => [{ role: 'user', content }];

/** A client of the AI SDK. `modelOf` makes its model. */
const aiSdk = (modelOf) => ({
  plain: (service, prompt) => generateText({ model: modelOf(service), prompt }),
  async stream(service, prompt) {
    const { fullStream } = streamText({ model: modelOf(service), prompt, onError() {} });
    for await (const part of fullStream) if (part.type === 'error') throw part.error;
  },
});

const openai = (service) => new OpenAI(service).chat.completions;
const openRouter = ({ baseURL, apiKey }) => new OpenRouter({ serverURL: baseURL, apiKey }).chat;
const openRouterRequest = (content, stream) => ({ chatRequest: { model, messages: messagesOf(content), stream } });

async function readToEnd(stream) {
  for await (const chunk of stream) void chunk;
}

const clients = {
  openai: {
    plain: (service, content) => openai(service).create({ model, messages: messagesOf(content) }),
    stream: async (service, content) => readToEnd(await openai(service).create({ model, messages: messagesOf(content), stream: true })),
  },
  '@ai-sdk/openai': aiSdk((service) => createOpenAI(service).chat(model)),
  '@ai-sdk/openai-compatible': aiSdk((service) => createOpenAICompatible({ ...service, name: 'gptutor' })(model)),
  '@openrouter/ai-sdk-provider': aiSdk((service) => createOpenRouter(service)(model)),
  '@openrouter/sdk': {
    plain: (service, content) => openRouter(service).send(openRouterRequest(content, false)),
    stream: async (service, content) => readToEnd(await openRouter(service).send(openRouterRequest(content, true))),
  },
};

/** The class and the text of the error; null without one. */
async function errorOf(promise) {
  try {
    await promise;
    return null;
  } catch (error) {
    const last = error.lastError ?? error; // the AI SDK's RetryError has the errors of all attempts
    return { kind: last.name === 'Error' ? last.constructor.name : last.name, text: last.message ?? String(last), status: last.statusCode ?? last.status };
  }
}

/** How many requests a client sends if each gets a 500 that says not to repeat it. */
async function requestsOf(client) {
  let sent = 0;
  const server = createServer((request, response) => {
    request.resume();
    sent += 1;
    const status = sent < REQUESTS_MAX ? 500 : 400;
    response.writeHead(status, { 'Content-Type': 'application/json', 'x-should-retry': 'false', Connection: 'close' });
    response.end(JSON.stringify({ error: { message: 'Internal server error', type: 'server_error', code: status, param: null } }));
  });
  await new Promise((resolve) => server.listen(0, '127.0.0.1', resolve));
  await errorOf(client.plain({ baseURL: `http://127.0.0.1:${server.address().port}/v1`, apiKey: 'sk-user-x' }, 'Hello'));
  server.close();
  return sent;
}

async function observe(client) {
  const rich = { baseURL: process.env.GATEWAY_URL, apiKey: process.env.GATEWAY_KEY };
  const [insufficient, unknown, invalid, broken, complete, requests] = await Promise.all([
    errorOf(client.plain({ ...rich, apiKey: process.env.GATEWAY_POOR_KEY }, 'Hello')),
    errorOf(client.plain({ ...rich, apiKey: 'sk-user-nobody' }, 'Hello')),
    errorOf(client.plain(rich, 'fault:status=400')),
    errorOf(client.stream(rich, 'fault:cut=3')),
    errorOf(client.stream(rich, 'Hello')),
    requestsOf(client),
  ]);
  return { insufficient, unknown, invalid, broken, complete, requests };
}

const observed = await Promise.all(Object.entries(clients).map(async ([name, client]) => [name, await observe(client)]));
console.log(JSON.stringify(Object.fromEntries(observed), null, 2));

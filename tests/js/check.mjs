// OpenAI's SDK for JavaScript against a running gateway: base URL and key in the environment, one line for each thing that works.
import assert from 'node:assert/strict';
import OpenAI from 'openai';

const baseURL = process.env.GATEWAY_URL;
const openai = new OpenAI({ apiKey: process.env.GATEWAY_KEY, baseURL, maxRetries: 0 });
const messages = [{ role: 'user', content: 'Привет!' }];
const model = 'google/gemini-2.5-flash-lite';

const checks = {
  async 'a plain completion'() {
    const completion = await openai.chat.completions.create({ model, messages });
    assert.match(completion.choices[0].message.content, /Привет/);
    assert.ok(completion.usage.cost > 0);
  },
  async 'the default model'() {
    const completion = await openai.chat.completions.create({ messages });
    assert.equal(completion.model, model);
  },
  async 'a stream'() {
    const stream = await openai.chat.completions.create({ model, messages, stream: true });
    let text = '';
    let usage = null;
    for await (const chunk of stream) {
      text += chunk.choices[0]?.delta?.content ?? '';
      usage = chunk.usage ?? usage;
    }
    assert.match(text, /Привет/);
    assert.ok(usage.cost > 0);
  },
  async 'the raw response'() {
    const response = await openai.chat.completions.create({ model, messages }).asResponse();
    assert.equal(response.status, 200);
    assert.ok(response.headers.get('x-request-id'));
    assert.match(response.headers.get('x-generation-id'), /^gen-/);
  },
  async 'the request id on the answer'() {
    const completion = await openai.chat.completions.create({ model, messages });
    assert.ok(completion._request_id);
  },
  async 'AuthenticationError'() {
    const stranger = new OpenAI({ apiKey: 'sk-user-nobody', baseURL, maxRetries: 0 });
    await assert.rejects(stranger.chat.completions.create({ model, messages }), (error) => {
      assert.ok(error instanceof OpenAI.AuthenticationError);
      assert.match(error.message, /Invalid API key or inactive user/);
      return true;
    });
  },
  async 'BadRequestError'() {
    await assert.rejects(openai.chat.completions.create({ model, messages: [] }), (error) => {
      assert.ok(error instanceof OpenAI.BadRequestError);
      assert.match(error.message, /messages array is required/);
      return true;
    });
  },
  async 'an APIError where a stream breaks off'() {
    const broken = [{ role: 'user', content: 'fault:cut=4' }];
    const stream = await openai.chat.completions.create({ model, messages: broken, stream: true });
    await assert.rejects(async () => {
      for await (const chunk of stream) void chunk;
    }, OpenAI.APIError);
  },
  async 'the list of models'() {
    const models = [];
    for await (const entry of openai.models.list()) models.push(entry.id);
    assert.equal(models.length, 326);
    assert.equal((await openai.models.retrieve(model)).id, model);
  },
};

for (const [name, check] of Object.entries(checks)) {
  await check();
  console.log(`ok ${name}`);
}

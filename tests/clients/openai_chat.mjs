// Conversations with the official openai client for Node. Usage: openai_chat.mjs BASE_URL
import assert from "node:assert/strict";
import OpenAI from "openai";

const client = new OpenAI({ baseURL: process.argv[2] + "/v1", apiKey: "none", maxRetries: 0, timeout: 60_000 });
const model = (await client.models.list()).data[0].id;
const question = [{ role: "user", content: "What is a KV cache?" }];
const price = {
  type: "function",
  function: {
    name: "get_price",
    description: "Get the price of an item",
    parameters: { type: "object", properties: { item: { type: "string", enum: ["tomatoes", "apples"] } }, required: ["item"] },
  },
};
const ask = (messages, options) => client.chat.completions.create({ model, messages, temperature: 0, ...options });

async function conversation() {
  const first = (await ask(question)).choices[0];
  assert.match(first.message.content, /cache/);
  assert.equal(first.finish_reason, "stop");
  const more = [...question, first.message, { role: "user", content: "What is 25 + 7?" }];
  assert.ok((await ask(more)).choices[0].message.content);
  return first.message.content;
}

async function streaming(whole) {
  let [text, usage] = ["", null];
  for await (const chunk of await ask(question, { stream: true, stream_options: { include_usage: true } })) {
    text += chunk.choices[0]?.delta?.content ?? "";
    usage = chunk.usage ?? usage;
  }
  assert.equal(text, whole);
  assert.ok(usage.completion_tokens > 1);
  const final = client.chat.completions.stream({ model, messages: question, temperature: 0 });
  assert.equal(await final.finalContent(), whole);
}

async function tools() {
  const messages = [{ role: "user", content: "Check the price of tomatoes." }];
  const options = { tools: [price], tool_choice: "required", parallel_tool_calls: false };
  const { message } = (await ask(messages, options)).choices[0];
  const call = message.tool_calls[0];
  assert.equal(call.function.name, "get_price");
  assert.ok("item" in JSON.parse(call.function.arguments));
  const result = { role: "tool", tool_call_id: call.id, content: '{"price": 14}' };
  const after = (await ask([...messages, message, result], { tools: [price] })).choices[0].message;
  assert.ok(after.content || after.tool_calls);
  const stream = client.chat.completions.stream({ model, messages, temperature: 0, ...options });
  const streamed = (await stream.finalMessage()).tool_calls[0];
  assert.deepEqual(streamed.function.arguments, call.function.arguments);
}

async function responses(whole) {
  const response = await client.responses.create({ model, input: question[0].content, temperature: 0 });
  assert.equal(response.output_text, whole);
  let text = "";
  for await (const event of await client.responses.create({ model, input: question[0].content, temperature: 0, stream: true })) {
    if (event.type === "response.output_text.delta") text += event.delta;
  }
  assert.equal(text, whole);
}

async function embeddings() {
  const input = ["What is a KV cache?", "Tell me a story about a fox."];
  const { data, usage } = await client.embeddings.create({ model, input });
  assert.deepEqual(data.map((item) => item.index), [0, 1]);
  assert.ok(data.every(({ embedding }) => embedding.length === 256), "base64 on the wire, numbers here");
  assert.ok(usage.prompt_tokens > 0);
  const plain = (await client.embeddings.create({ model, input: input[1], encoding_format: "float" })).data[0].embedding;
  assert.ok(plain.every((number, at) => Math.abs(number - data[1].embedding[at]) < 1e-6));
}

async function errors() {
  await assert.rejects(ask(question, { model: "no-such-model" }), OpenAI.NotFoundError);
  await assert.rejects(ask(question, { temperature: -3 }), OpenAI.BadRequestError);
}

const whole = await conversation();
await streaming(whole);
await tools();
await responses(whole);
await embeddings();
await errors();
console.log("ok");

// Conversations through Vercel's ai SDK. Usage: ai_sdk.mjs BASE_URL
import assert from "node:assert/strict";
import { createOpenAICompatible } from "@ai-sdk/openai-compatible";
import { APICallError, embedMany, generateText, jsonSchema, streamText, tool } from "ai";

const baton = createOpenAICompatible({ name: "baton", baseURL: process.argv[2] + "/v1", apiKey: "none", includeUsage: true });
const settings = { model: baton("demo"), temperature: 0, maxRetries: 0 };
const question = "What is a KV cache?";
const tools = {
  get_price: tool({
    description: "Get the price of an item",
    inputSchema: jsonSchema({ type: "object", properties: { item: { type: "string", enum: ["tomatoes", "apples"] } }, required: ["item"] }),
    execute: async () => ({ price: 14 }),
  }),
};

async function embeddings() {
  const values = ["What is a KV cache?", "Tell me a story about a fox."];
  const { embeddings, usage } = await embedMany({ model: baton.embeddingModel("demo"), values, maxRetries: 0 });
  assert.deepEqual(embeddings.map((vector) => vector.length), [256, 256]);
  assert.ok(usage.tokens > 0);
}

async function conversation() {
  const first = await generateText({ ...settings, prompt: question });
  assert.match(first.text, /cache/);
  assert.equal(first.finishReason, "stop");
  const messages = [{ role: "user", content: question }, ...first.response.messages, { role: "user", content: "What is 25 + 7?" }];
  assert.ok((await generateText({ ...settings, messages })).text);
  return first.text;
}

async function streaming(whole) {
  const stream = streamText({ ...settings, prompt: question });
  let text = "";
  for await (const delta of stream.textStream) text += delta;
  assert.equal(text, whole);
  assert.ok((await stream.usage).outputTokens > 1);
}

async function toolCalls() {
  const prompt = "Check the price of tomatoes.";
  const toolChoice = { type: "tool", toolName: "get_price" };
  const called = await generateText({ ...settings, prompt, tools, toolChoice });
  assert.equal(called.toolCalls[0].toolName, "get_price");
  assert.ok("item" in called.toolCalls[0].input);
  const streamed = streamText({ ...settings, prompt, tools, toolChoice });
  assert.equal((await streamed.toolCalls)[0].toolName, "get_price");
  const messages = [{ role: "user", content: prompt }, ...called.response.messages];
  const after = await generateText({ ...settings, messages, tools });
  assert.ok(after.text || after.toolCalls.length);
}

async function errors() {
  const failing = (model, more) => generateText({ ...settings, model: baton(model), prompt: "hi", ...more });
  await assert.rejects(failing("no-such-model"), error => APICallError.isInstance(error) && error.statusCode === 404);
  await assert.rejects(failing("demo", { temperature: -3 }), error => error.statusCode === 400);
}

const whole = await conversation();
await streaming(whole);
await toolCalls();
await embeddings();
await errors();
console.log("ok");

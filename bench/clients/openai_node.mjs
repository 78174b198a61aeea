// openai-node, as in its README. Reads the server from standard input, prints what steps.py prints.
import assert from "node:assert";
import { readFileSync } from "node:fs";
import OpenAI from "openai";
import { zodFunction, zodResponseFormat, zodResponsesFunction, zodTextFormat } from "openai/helpers/zod";
import { VERSION } from "openai/version";
import { z } from "zod";

const server = JSON.parse(readFileSync(0, "utf8"));
const client = new OpenAI({ baseURL: `${server.url}/v1`, apiKey: server.key, maxRetries: 0 });
const Town = z.object({ size: z.enum(["village", "town", "city"]), capital: z.boolean() });
const weather = { name: "weather", description: "Get the weather of a town.", parameters: z.object({ town: z.enum(["Paris", "Rome"]) }) };
const question = { role: "user", content: "What is the capital of France?" };
const toolQuestion = { role: "user", content: "How is the weather in Paris?" };
const followUp = { role: "user", content: "And of Italy?" };
const fields = { model: server.model, temperature: 0, max_completion_tokens: 64 };
const itemFields = { model: server.model, temperature: 0, max_output_tokens: 64 };

const message = async (messages, more = {}) => (await client.chat.completions.create({ ...fields, messages, ...more })).choices[0].message;
const result = (call) => `It is 12 degrees in ${weather.parameters.parse(JSON.parse(call.arguments)).town}.`;

const steps = {
  async list_models() {
    const models = [];
    for await (const model of client.models.list()) models.push(model.id);
    assert(models.includes(server.model));
  },
  async answer() {
    assert((await message([question])).content);
  },
  async stream() {
    let text = "";
    for await (const chunk of await client.chat.completions.create({ ...fields, messages: [question], stream: true }))
      text += chunk.choices[0]?.delta?.content ?? "";
    assert(text);
  },
  async second_turn() {
    const streamed = await client.chat.completions.stream({ ...fields, messages: [question] }).finalMessage();
    for (const first of [await message([question]), streamed]) assert((await message([question, first, followUp])).content);
  },
  async tool_loop() {
    const tools = [zodFunction(weather)];
    const called = await message([toolQuestion], { tools, tool_choice: "required" });
    const results = called.tool_calls.map((call) => ({ role: "tool", tool_call_id: call.id, content: result(call.function) }));
    assert(results.length && (await message([toolQuestion, called, ...results], { tools, tool_choice: "none" })).content);
  },
  async structured_output() {
    const response_format = zodResponseFormat(Town, "town");
    const parsed = await client.chat.completions.parse({ ...fields, messages: [question], response_format });
    Town.parse(parsed.choices[0].message.parsed);
  },
  async responses() {
    const tools = [zodResponsesFunction(weather)];
    const input = [question, ...(await client.responses.create({ ...itemFields, input: [question] })).output, toolQuestion];
    const called = await client.responses.stream({ ...itemFields, input, tools, tool_choice: "required" }).finalResponse();
    input.push(...called.output);
    for (const call of called.output) input.push({ type: "function_call_output", call_id: call.call_id, output: result(call) });
    assert((await client.responses.create({ ...itemFields, input, tools, tool_choice: "none" })).output_text);
    Town.parse((await client.responses.parse({ ...itemFields, input, text: { format: zodTextFormat(Town, "town") } })).output_parsed);
  },
};

const cells = {};
for (const [name, step] of Object.entries(steps)) {
  try {
    await step();
    cells[name] = "yes";
  } catch (error) {
    console.error(error);
    cells[name] = "no: " + (error.code ? `${error.code} ${error.param ?? ""}`.trim() : String(error).slice(0, 200));
  }
}
console.log("\n" + JSON.stringify({ version: `openai ${VERSION}`, cells }));

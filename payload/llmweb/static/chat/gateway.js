// The page's own origin, which asks a gateway in the name of the session.
export class Refusal extends Error {
  constructor(code, message, id = "") {
    super(message);
    this.code = code;
    this.id = id;
  }
}

export class Gateway {
  constructor(token) {
    this.token = token;
  }

  // A response that is no refusal; throws Refusal, or AbortError once `signal` stops it.
  async ask(method, path, body, { signal, fresh = false } = {}) {
    const headers = { "x-csrf-token": this.token };
    if (body) headers["content-type"] = "application/json";
    const options = { method, headers, body: body && JSON.stringify(body), signal, cache: fresh ? "no-cache" : "no-store" };
    if (fresh) headers["cache-control"] = "no-cache";
    let response;
    try {
      response = await fetch(`/page/v1/${path}`, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("network", error.message);
    }
    if (response.ok) return response;
    const id = response.headers.get("x-request-id") ?? "";
    const said = await response.json().catch(() => ({}));
    // Key, token or session: whichever has ended, one signs in again.
    const code = response.status === 401 ? "no_session" : said.error?.code;
    throw new Refusal(code ?? `${response.status}`, said.error?.message ?? `${response.status}`, id);
  }

  async models() {
    const { data } = await (await this.ask("GET", "models")).json();
    return data.filter((each) => !each.dimensions).map((each) => each.id);
  }

  async kept() {
    return (await this.ask("GET", "feedback")).json();
  }

  async forget() {
    return (await this.ask("DELETE", "feedback")).json();
  }

  // Whether the texts of the rating are kept.
  async rate(rating) {
    return (await (await this.ask("POST", "feedback", rating)).json()).text_kept;
  }

  // Calls `think` with each part of the reasoning, `piece` with each part of the answer, and returns its id and model, and why it ended; throws as `ask` does, also in
  // the middle. `begun` is called with the id, before the first part.
  async answer(model, messages, { signal, fresh, begun, think, piece }) {
    const response = await this.ask("POST", "chat/completions", { model, messages, stream: true }, { signal, fresh });
    begun({ id: response.headers.get("x-llm-response-id") ?? "", model: response.headers.get("x-llm-model") ?? model });
    const id = response.headers.get("x-request-id") ?? "";
    let ended = "";
    let whole = false;
    for await (const event of events(response.body)) {
      if (event === "[DONE]") {
        whole = true; // the connection ends by itself
        continue;
      }
      const said = JSON.parse(event);
      if (said.error) throw new Refusal(said.error.code, said.error.message, id);
      const [choice] = said.choices ?? [];
      const thought = choice?.delta?.reasoning ?? choice?.delta?.reasoning_content;
      if (thought) think(thought);
      if (choice?.delta?.content) piece(choice.delta.content);
      if (choice?.finish_reason) ended = choice.finish_reason;
    }
    if (!whole) throw new Refusal("broken", "the answer has no end", id);
    return ended;
  }
}

// The data of server-sent events.
async function* events(body) {
  const reader = body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { value, done } = await reader.read();
      if (done) return;
      const parts = (rest + value).split("\n\n");
      rest = parts.pop();
      for (const part of parts) {
        if (part.startsWith("data: ")) yield part.slice(6);
      }
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Refusal("broken", error.message);
  }
}

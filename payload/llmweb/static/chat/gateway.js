// The page's own origin, which asks a gateway in the name of the session.
const RETRIES = 2; // as OpenAI's clients have it
const LONGEST_WAIT = 20; // seconds

export class Refusal extends Error {
  // `wait`: seconds after which it may be asked again; NaN if that was not said.
  constructor(code, message, id = "", wait = NaN) {
    super(message);
    Object.assign(this, { code, id, wait });
  }
}

export class Gateway {
  // `most`: bytes of a request.
  constructor(token, most) {
    this.token = token;
    this.most = most;
  }

  // A response that is no refusal; throws Refusal, or AbortError once `signal` stops it.
  async ask(method, path, body, { signal, fresh = false } = {}) {
    const headers = { "x-csrf-token": this.token };
    if (body) headers["content-type"] = "application/json";
    const content = body && JSON.stringify(body);
    const { size } = new Blob([content ?? ""]);
    if (size > this.most) throw new Refusal("body_too_large", `the request has ${size} bytes, more than ${this.most}`);
    const options = { method, headers, body: content, signal, cache: fresh ? "no-cache" : "no-store" };
    if (fresh) headers["cache-control"] = "no-cache";
    let response;
    try {
      response = await fetch(`/page/v1/${path}`, options);
    } catch (error) {
      if (error.name === "AbortError") throw error;
      throw new Refusal("network", error.message);
    }
    if (response.ok) return response;
    const said = await response.json().catch(() => ({}));
    throw refusal(response.status, (name) => response.headers.get(name), said);
  }

  // Sends a file, and returns the response's object; throws Refusal. `progress` is called with the part of it that is sent, up to 1,
  // which fetch does not tell.
  send(path, file, progress) {
    return new Promise((resolve, reject) => {
      const request = new XMLHttpRequest();
      request.open("POST", `/page/v1/${path}`);
      request.setRequestHeader("x-csrf-token", this.token);
      request.setRequestHeader("content-type", "application/octet-stream");
      request.responseType = "json";
      request.upload.addEventListener("progress", ({ loaded, total }) => progress(total ? loaded / total : 1));
      request.addEventListener("error", () => reject(new Refusal("network", "the connection broke off")));
      request.addEventListener("load", () => {
        const { status, response } = request;
        if (status < 300) resolve(response);
        else reject(refusal(status, (name) => request.getResponseHeader(name), response ?? {}));
      });
      request.send(file);
    });
  }

  // As `ask`, and again where a refusal says after how long. `waiting` is called with the seconds and the number of the retry.
  async askAgain(method, path, body, { waiting, ...options }) {
    for (let retry = 1; ; retry++) {
      try {
        return await this.ask(method, path, body, options);
      } catch (error) {
        if (retry > RETRIES || !(error.wait >= 0 && error.wait <= LONGEST_WAIT)) throw error;
        waiting(error.wait, retry);
        await pause(error.wait, options.signal);
      }
    }
  }

  async models() {
    const { data } = await (await this.ask("GET", "models")).json();
    return data.filter((each) => !each.dimensions && !each.deprecated).map((each) => each.id);
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

  // Tokens and requests that are left, and until when.
  async usage() {
    return (await this.ask("GET", "usage")).json();
  }

  // Calls `think` with each part of the reasoning, `piece` with each part of the answer, and returns why it ended; throws as `ask`
  // does, also in the middle. `begun` is called with id and model, before the first part; `waiting`, before it is asked again; `cite`
  // with the passages of an answer from documents.
  async answer(model, messages, { signal, fresh, waiting, begun, think, piece, cite }) {
    const body = { model, messages, stream: true };
    const response = await this.askAgain("POST", "chat/completions", body, { signal, fresh, waiting });
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
      if (said.documents) cite(said.documents);
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

// `header`: gives a header of the response, or null.
function refusal(status, header, said) {
  // Key, token or session: whichever has ended, one signs in again.
  const code = status === 401 ? "no_session" : said.error?.code;
  const wait = [429, 503].includes(status) ? parseFloat(header("retry-after")) : NaN;
  return new Refusal(code ?? `${status}`, said.error?.message ?? `${status}`, header("x-request-id") ?? "", wait);
}

function pause(seconds, signal) {
  return new Promise((resolve, reject) => {
    const timer = setTimeout(resolve, seconds * 1000);
    signal.addEventListener("abort", () => {
      clearTimeout(timer);
      reject(signal.reason);
    });
  });
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

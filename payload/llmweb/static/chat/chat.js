// The chat page. What a model says is a text node while it comes, and sanitised Markdown afterwards.
import { Conversations, Unkept } from "./conversations.js";
import { Gateway } from "./gateway.js";
import { rendered } from "./markdown.js";

const at = (selector) => document.querySelector(selector);
const chat = at("#chat");
const gateway = new Gateway(chat.dataset.token);
const said = Object.fromEntries(
  [...at("#words").content.querySelectorAll("[data-word]")].map((each) => [each.dataset.word, each.textContent]),
);
const words = (name, values = {}) => said[name].replace(/\{(\w+)\}/g, (_, value) => values[value]);

let kept = new Unkept();
let conversation;
let stopping = null; // while an answer comes

function say(text) {
  at("#status").textContent = text;
}

function refused(error) {
  const known = said[`error_${error.code}`] ?? (error.code === "broken" ? words("broken") : "");
  const text = known || words("failed", { message: error.message });
  return error.id ? `${text} ${words("id", { id: error.id })}` : text;
}

function begin() {
  conversation = { id: crypto.randomUUID(), title: "", messages: [] };
  at("#messages").replaceChildren();
}

function copy(name) {
  return at(`#${name}`).content.cloneNode(true).firstElementChild;
}

function shown(message) {
  const article = copy(message.role === "user" ? "question-message" : "answer-message");
  const text = article.querySelector(".text");
  if (message.role === "user") {
    text.append(message.content);
  } else {
    article.querySelector("h2").textContent = words("of_model", { model: message.model });
    text.append(rendered(message.content));
    think(article, message.thoughts);
    note(article, message);
    acting(article, message);
  }
  at("#messages").append(article);
  return article;
}

function think(article, thoughts) {
  const place = article.querySelector(".thoughts");
  place.hidden = !thoughts;
  place.lastElementChild.textContent = thoughts ?? "";
}

function note(article, message) {
  const place = article.querySelector(".note");
  place.textContent = said[message.ended] ?? "";
  place.hidden = !place.textContent;
}

// The buttons below an answer.
function acting(article, message) {
  const of = (selector) => article.querySelector(selector);
  const form = of(".rating");
  const press = () => {
    of(".up").setAttribute("aria-pressed", message.thumb === "up");
    of(".down").setAttribute("aria-pressed", message.thumb === "down");
  };
  const rate = async (thumb, texts = {}) => {
    const texted = Object.entries(texts).filter(([, text]) => text);
    const rating = { id: message.id, ...(thumb && { thumb }), ...Object.fromEntries(texted) };
    if (!rating.thumb && !rating.correction) return say(words("no_rating"));
    const rated = conversation; // another one may be shown when it is kept
    try {
      const textKept = await gateway.rate(rating);
      message.thumb = thumb;
      press();
      say(words(textKept ? "rated_kept" : "rated"));
      await kept.put(rated);
      return true;
    } catch (error) {
      say(refused(error));
    }
  };
  const unfold = (open) => {
    form.hidden = !open;
    of(".correct").setAttribute("aria-expanded", open);
    if (open) form.correction.value ||= message.content.slice(0, form.correction.maxLength);
  };
  press();
  of(".up").addEventListener("click", () => rate("up"));
  of(".down").addEventListener("click", async () => {
    if (await rate("down")) {
      unfold(true);
      form.reason.focus();
    }
  });
  of(".correct").addEventListener("click", () => {
    unfold(form.hidden);
    if (!form.hidden) form.correction.focus();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const texts = Object.fromEntries(new FormData(form));
    if (texts.correction === message.content.slice(0, form.correction.maxLength)) texts.correction = "";
    if (await rate(message.thumb, texts)) {
      unfold(false);
      of(".correct").focus();
    }
  });
  of(".copy").addEventListener("click", () => {
    navigator.clipboard.writeText(message.content).then(
      () => say(words("copied")),
      () => say(words("uncopied")),
    );
  });
  of(".again").addEventListener("click", () => {
    if (stopping || message !== conversation.messages.at(-1)) return;
    conversation.messages.pop();
    article.remove();
    answer(message);
    at("#stop").focus();
  });
}

async function list() {
  const items = (await kept.all()).map((each) => {
    const item = copy("conversation-item");
    const open = item.querySelector(".open");
    open.textContent = each.title;
    open.addEventListener("click", () => each.id !== conversation.id && show(each));
    const remove = item.querySelector(".delete");
    remove.setAttribute("aria-label", words("delete_named", { title: each.title }));
    remove.addEventListener("click", async () => {
      if (each.id === conversation.id) {
        stopping?.abort();
        begin();
      }
      await kept.remove(each.id);
      await list();
      at("#conversations summary").focus();
      say(words("deleted"));
    });
    return item;
  });
  at("#conversations ul").replaceChildren(...items);
  at("#delete-all").hidden = items.length === 0;
}

function show(found) {
  stopping?.abort();
  conversation = found;
  at("#messages").replaceChildren();
  conversation.messages.forEach(shown);
  at("#question").focus();
}

function busy(controller) {
  stopping = controller;
  at("#stop").hidden = !controller;
  at("#send").disabled = Boolean(controller);
}

// Asks for an answer to the conversation as it is. `before`: the one it replaces, which stays if none comes.
async function answer(before = null) {
  const asked = conversation;
  const message = { role: "assistant", content: "", model: at("#model").value, id: "", ended: "" };
  const article = shown(message);
  const text = document.createTextNode("");
  article.querySelector(".text").replaceChildren(text);
  article.setAttribute("aria-busy", "true");
  article.scrollIntoView({ block: "nearest" });
  const controller = new AbortController();
  busy(controller);
  say(words("answering"));
  const history = asked.messages.map(({ role, content }) => ({ role, content }));
  let end = words("answered");
  try {
    const why = await gateway.answer(message.model, history, {
      signal: controller.signal,
      fresh: Boolean(before), // not from the cache
      begun: (what) => Object.assign(message, what),
      think: (more) => {
        message.thoughts = (message.thoughts ?? "") + more;
        think(article, message.thoughts);
      },
      piece: (more) => {
        text.appendData(more);
        message.content += more;
      },
    });
    if (why === "length") message.ended = "cut";
  } catch (error) {
    message.ended = error.name === "AbortError" ? "stopped" : "broken";
    end = error.name === "AbortError" ? words("stopped") : refused(error);
  }
  if (stopping === controller) {
    if (document.activeElement === at("#stop")) at("#question").focus();
    busy(null);
  }
  article.remove();
  const last = message.content ? message : before;
  if (last) asked.messages.push(last);
  if (asked === conversation) {
    if (last) shown(last);
    else at("#question").value ||= asked.messages.at(-1).content; // to be sent again
    say(end);
  }
  await kept.put(asked);
  await list();
}

// What the host keeps; texts are text nodes here.
async function look() {
  const { data, left_out: older, others } = await gateway.kept();
  const lines = data.map((each) => {
    const time = new Date(each.time).toLocaleString(document.documentElement.lang);
    if (each.object === "exchange") {
      const last = typeof each.prompt === "string" ? each.prompt : each.prompt.at(-1).content;
      return words("kept_exchange", { time, what: `${last} → ${each.answer}` });
    }
    const parts = [each.thumb, each.stars, each.reason, each.comment, each.correction];
    return words("kept_rating", { time, what: parts.filter(Boolean).join(", ") });
  });
  if (older) lines.push(words("kept_older", { count: older }));
  if (others) lines.push(words("kept_others", { count: others }));
  if (!lines.length) lines.push(words("nothing_kept"));
  const items = lines.map((line) => {
    const item = document.createElement("li");
    item.textContent = line;
    return item;
  });
  at("#kept ul").replaceChildren(...items);
  at("#forget").hidden = !data.length && !others;
}

async function forget() {
  if (!confirm(words("really"))) return;
  const { removed, left } = await gateway.forget();
  await look();
  say(words("forgotten", { removed, left }));
  at("#kept summary").focus();
}

async function ask() {
  const question = at("#question").value.trim();
  if (!question || stopping) return;
  at("#question").value = "";
  // A question whose answer never came would stand beside this one.
  while (conversation.messages.at(-1)?.role === "user") {
    conversation.messages.pop();
    at("#messages").lastElementChild.remove();
  }
  conversation.title ||= question.slice(0, 60);
  const message = { role: "user", content: question };
  conversation.messages.push(message);
  shown(message);
  kept.put(conversation).then(list); // so that it can be deleted while its answer comes
  await answer();
}

async function start() {
  try {
    kept = await Conversations.open(chat.dataset.subject);
  } catch {
    say(words("unkept"));
  }
  begin();
  await list();
  at("#ask").addEventListener("submit", (event) => {
    event.preventDefault();
    ask();
  });
  at("#question").addEventListener("keydown", (event) => {
    if (event.key === "Enter" && !event.shiftKey && !event.isComposing) {
      event.preventDefault();
      ask();
    }
  });
  at("#stop").addEventListener("click", () => {
    stopping?.abort();
    at("#question").focus();
  });
  at("#new").addEventListener("click", () => {
    stopping?.abort();
    begin();
    at("#question").focus();
  });
  at("#delete-all").addEventListener("click", async () => {
    stopping?.abort();
    await kept.clear();
    begin();
    await list();
    at("#conversations summary").focus();
    say(words("deleted"));
  });
  const tried = (work) => () => work().catch((error) => say(refused(error)));
  at("#kept").addEventListener("toggle", () => at("#kept").open && tried(look)());
  at("#forget").addEventListener("click", tried(forget));
  chat.hidden = false;
  at("#question").focus();
  try {
    const models = await gateway.models();
    at("#model").replaceChildren(...models.map((name) => new Option(name, name)));
    if (!models.length) say(words("no_models"));
  } catch (error) {
    say(refused(error));
  }
}

await start();

// The chat page: one conversation with a model.
import { Composer } from "./composer.js";
import { Conversations, Unkept } from "./conversations.js";
import { Documents } from "./documents.js";
import { Gateway } from "./gateway.js";
import { Library } from "./library.js";
import * as messages from "./messages.js";
import { amount, at, element, refused, say, words } from "./page.js";

const chat = at("#chat");
const most = Number(chat.dataset.bytes);
const gateway = new Gateway(chat.dataset.token, most);
const composer = new Composer(most);
let kept = new Unkept();
let library;
let conversation;
let stopping = null; // while an answer comes

function begin() {
  show({ id: crypto.randomUUID(), title: "", system: "", messages: [] });
}

function show(other) {
  stopping?.abort();
  if (composer.target) composer.clear();
  conversation = other;
  at("#system").value = conversation.system ?? "";
  at("#system-used").hidden = !conversation.system;
  draw(0);
  at("#question").focus();
}

// Shows the conversation's messages from the one at `first` on anew.
function draw(first) {
  [...at("#messages").children].slice(first).forEach((each) => each.remove());
  at("#messages").append(...conversation.messages.slice(first).map(article));
}

function article(message) {
  return message.role === "user" ? messages.question(message, edit) : messages.answer(message, { rate, regenerate });
}

function edit(message) {
  if (stopping) return;
  composer.fill(message, message);
  at("#question").focus();
}

async function rate(message, rating) {
  const current = conversation; // another one may be shown when the rating is kept
  const textsKept = await gateway.rate(rating);
  message.thumb = rating.thumb;
  await kept.put(current);
  return textsKept;
}

function regenerate(message) {
  if (stopping || message !== conversation.messages.at(-1)) return;
  answer(conversation.messages.length - 1);
  at("#stop").focus();
}

function busy(controller) {
  stopping = controller;
  at("#stop").hidden = !controller;
  at("#send").disabled = Boolean(controller);
}

async function showQuota() {
  const place = at("#quota");
  try {
    const { tokens_per_minute: minute, tokens_per_day: day } = await gateway.usage();
    const until = new Date(day.resets_at).toLocaleTimeString(document.documentElement.lang, { hour: "2-digit", minute: "2-digit" });
    place.textContent = words("quota", { minute: amount(minute.remaining), day: amount(day.remaining), until });
  } catch (error) {
    place.textContent = error.code === "denied" ? "" : words("no_quota");
  }
}

// Asks for an answer to the first `count` messages and `question`. Messages after these stay if no answer comes.
async function answer(count, question = null) {
  const current = conversation; // another one may be shown when the answer is there
  const rest = current.messages.splice(count);
  const hasAnswer = rest.some(({ role }) => role === "assistant");
  if (question) current.messages.push(question);
  draw(count);
  if (!hasAnswer) kept.put(current).then(() => library.list()); // so that it can be deleted while its answer comes
  const message = { role: "assistant", content: "", model: at("#model").value, id: "", ended: "" };
  const coming = article(message);
  const text = document.createTextNode("");
  coming.querySelector(".text").replaceChildren(text);
  coming.setAttribute("aria-busy", "true");
  at("#messages").append(coming);
  coming.scrollIntoView({ block: "nearest" });
  const controller = new AbortController();
  busy(controller);
  say(words("answering"));
  const system = current.system?.trim() ? [{ role: "system", content: current.system }] : [];
  const history = current.messages.map((each) => ({ role: each.role, content: messages.readable(each) }));
  let end = words("answered");
  try {
    const reason = await gateway.answer(message.model, [...system, ...history], {
      signal: controller.signal,
      fresh: !question, // not from the cache
      waiting: (seconds, retry) => say(words("waiting", { seconds, retry })),
      begun: (about) => {
        Object.assign(message, about);
        if (stopping === controller) say(words("answering"));
      },
      think: (more) => {
        message.thoughts = (message.thoughts ?? "") + more;
        messages.think(coming, message.thoughts);
      },
      piece: (more) => {
        text.appendData(more);
        message.content += more;
      },
      cite: ({ citations, unsupported_quotes: quotes }) => {
        message.citations = citations.map(({ number, name, page, text }) => ({ number, name, page, text }));
        message.quotes = quotes;
      },
    });
    if (reason === "length") message.ended = "cut";
  } catch (error) {
    message.ended = error.name === "AbortError" ? "stopped" : "broken";
    end = error.name === "AbortError" ? words("stopped") : refused(error);
  }
  if (stopping === controller) {
    if (document.activeElement === at("#stop")) at("#question").focus();
    busy(null);
  }
  if (message.content) current.messages.push(message);
  else if (hasAnswer) current.messages.splice(count, current.messages.length, ...rest);
  if (current === conversation) {
    draw(count);
    if (question && !message.content && composer.empty) composer.fill(question, hasAnswer ? rest[0] : null); // to be sent again
    say(end);
  }
  await kept.put(current);
  await library.list();
  await showQuota();
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
  at("#kept ul").replaceChildren(...lines.map((line) => element("li", line)));
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
  if (composer.empty || stopping) return;
  const question = composer.message;
  const target = conversation.messages.indexOf(composer.target);
  let count = target < 0 ? conversation.messages.length : target;
  composer.clear();
  // A question whose answer never came would stand beside this one.
  while (conversation.messages[count - 1]?.role === "user") count--;
  conversation.title ||= (question.content || question.files[0].name).slice(0, 60);
  await answer(count, question);
}

async function start() {
  try {
    kept = await Conversations.open(chat.dataset.subject);
  } catch {
    say(words("unkept"));
  }
  library = new Library(kept, {
    open: (other) => other.id !== conversation.id && show(other),
    removing: (id) => (!id || id === conversation.id) && begin(),
  });
  chat.hidden = false;
  begin();
  await library.list();
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
  at("#system").addEventListener("input", () => {
    conversation.system = at("#system").value;
    at("#system-used").hidden = !conversation.system;
  });
  at("#system").addEventListener("change", () => {
    if (conversation.messages.length) kept.put(conversation).then(() => library.list());
  });
  at("#stop").addEventListener("click", () => {
    stopping?.abort();
    at("#question").focus();
  });
  at("#new").addEventListener("click", begin);
  const orSay = (work) => () => work().catch((error) => say(refused(error)));
  at("#kept").addEventListener("toggle", () => at("#kept").open && orSay(look)());
  at("#forget").addEventListener("click", orSay(forget));
  showQuota();
  new Documents(gateway).begin().catch((error) => error.code === "denied" || say(refused(error)));
  try {
    const models = await gateway.models();
    at("#model").replaceChildren(...models.map((name) => new Option(name, name, false, name === "default")));
    if (!models.length) say(words("no_models"));
  } catch (error) {
    say(refused(error));
  }
}

await start();

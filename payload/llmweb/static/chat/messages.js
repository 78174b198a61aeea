// Messages as articles. What a model says is a text node while it comes, and sanitised Markdown afterwards.
import { rendered } from "./markdown.js";
import { copy, element, refused, say, words } from "./page.js";

// What a model reads of a message: its text, then each file below its name, in a fence that is longer than any in the file.
export function readable({ content, files = [] }) {
  const parts = files.map(({ name, text }) => {
    let longest = 2;
    for (const [run] of text.matchAll(/`+/g)) longest = Math.max(longest, run.length);
    const fence = "`".repeat(longest + 1);
    return `${name}\n${fence}\n${text}\n${fence}`;
  });
  return [content, ...parts].filter(Boolean).join("\n\n");
}

export function question(message, edit) {
  const article = copy("question-message");
  const text = article.querySelector(".text");
  text.append(message.content);
  for (const file of message.files ?? []) {
    const details = document.createElement("details");
    details.className = "file";
    details.append(element("summary", file.name), element("pre", file.text));
    article.querySelector(".actions").before(details);
  }
  article.querySelector(".edit").addEventListener("click", () => edit(message));
  return article;
}

// `rate` sends a rating, and returns whether its texts are kept; `regenerate` asks for another answer.
export function answer(message, { rate, regenerate }) {
  const article = copy("answer-message");
  article.querySelector("h2").textContent = words("of_model", { model: message.model });
  article.querySelector(".text").append(rendered(message.content));
  think(article, message.thoughts);
  cite(article, message);
  const note = article.querySelector(".note");
  note.textContent = words(message.ended);
  note.hidden = !note.textContent;
  act(article, message, rate);
  article.querySelector(".again").addEventListener("click", () => regenerate(message));
  return article;
}

export function think(article, thoughts) {
  const place = article.querySelector(".thoughts");
  place.hidden = !thoughts;
  place.lastElementChild.textContent = thoughts ?? "";
}

// The passages that an answer cites, and its quotes that none of them has.
function cite(article, { citations = [], quotes = [] }) {
  for (const { number, name, page, text } of citations) {
    const details = document.createElement("details");
    details.className = "source";
    details.append(element("summary", words("source", { number, name, page })), element("p", text));
    article.querySelector(".note").before(details);
  }
  if (quotes.length) {
    const warning = element("p", words("unsupported", { quotes: quotes.map((quote) => `“${quote}”`).join(" ") }));
    warning.className = "unsupported";
    article.querySelector(".note").before(warning);
  }
}

// The buttons below an answer.
function act(article, message, send) {
  const part = (selector) => article.querySelector(selector);
  const form = part(".rating");
  const press = () => {
    part(".up").setAttribute("aria-pressed", message.thumb === "up");
    part(".down").setAttribute("aria-pressed", message.thumb === "down");
  };
  const rate = async (thumb, fields = {}) => {
    const texts = Object.entries(fields).filter(([, text]) => text);
    const rating = { id: message.id, ...(thumb && { thumb }), ...Object.fromEntries(texts) };
    if (!rating.thumb && !rating.correction) return say(words("no_rating"));
    try {
      say(words((await send(message, rating)) ? "rated_kept" : "rated"));
      press();
      return true;
    } catch (error) {
      say(refused(error));
    }
  };
  const unfold = (open) => {
    form.hidden = !open;
    part(".correct").setAttribute("aria-expanded", open);
    if (open) form.correction.value ||= message.content.slice(0, form.correction.maxLength);
  };
  press();
  part(".up").addEventListener("click", () => rate("up"));
  part(".down").addEventListener("click", async () => {
    if (await rate("down")) {
      unfold(true);
      form.reason.focus();
    }
  });
  part(".correct").addEventListener("click", () => {
    unfold(form.hidden);
    if (!form.hidden) form.correction.focus();
  });
  form.addEventListener("submit", async (event) => {
    event.preventDefault();
    const fields = Object.fromEntries(new FormData(form));
    if (fields.correction === message.content.slice(0, form.correction.maxLength)) fields.correction = "";
    if (await rate(message.thumb, fields)) {
      unfold(false);
      part(".correct").focus();
    }
  });
  part(".copy").addEventListener("click", () => {
    navigator.clipboard.writeText(message.content).then(
      () => say(words("copied")),
      () => say(words("uncopied")),
    );
  });
}

// The document: its parts, its templates, and its words in the reader's language.
export const at = (selector) => document.querySelector(selector);
const texts = Object.fromEntries(
  [...at("#words").content.querySelectorAll("[data-word]")].map((each) => [each.dataset.word, each.textContent]),
);

// The text of that name, with values in its braces; "" for a name that there is not.
export function words(name, values = {}) {
  return (texts[name] ?? "").replace(/\{(\w+)\}/g, (_, value) => values[value]);
}

export const amount = (count) => count.toLocaleString(document.documentElement.lang);

export function say(text) {
  at("#status").textContent = text;
}

export function refused(error) {
  const text = words(`error_${error.code}`) || words(error.code === "broken" ? "broken" : "failed", { message: error.message });
  return error.id ? `${text} ${words("id", { id: error.id })}` : text;
}

export function copy(name) {
  return at(`#${name}`).content.cloneNode(true).firstElementChild;
}

// An element of that name, with a text.
export function element(name, text) {
  const node = document.createElement(name);
  node.textContent = text;
  return node;
}

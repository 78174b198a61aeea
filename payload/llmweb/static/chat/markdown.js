// An answer's Markdown as nodes. Two things keep a model's output from being HTML: the parser is told that HTML is text, and what it
// writes is sanitised, whatever it is.
import { Marked } from "./marked.esm.js";
import "./purify.min.js";

const purify = globalThis.DOMPurify;
const TAGS = [
  "a", "blockquote", "br", "code", "del", "em", "h1", "h2", "h3", "h4", "h5", "h6", "hr", "li", "ol", "p", "pre", "strong",
  "table", "tbody", "td", "th", "thead", "tr", "ul",
];
const POLICY = {
  ALLOWED_TAGS: TAGS,
  ALLOWED_ATTR: ["href", "start", "title"],
  ALLOW_DATA_ATTR: false,
  ALLOW_ARIA_ATTR: false,
  ALLOWED_URI_REGEXP: /^(?:https?|mailto):/i,
  RETURN_DOM_FRAGMENT: true,
};
const ESCAPES = { "&": "&amp;", "<": "&lt;", ">": "&gt;", '"': "&quot;" };
const escaped = (text) => text.replace(/[&<>"]/g, (each) => ESCAPES[each]);

const parser = new Marked({
  gfm: true,
  breaks: true,
  renderer: {
    html: ({ text }) => escaped(text),
    // A picture from elsewhere would tell its host what was asked.
    image: ({ text, href }) => escaped(`${text} (${href})`),
    // Below the headings of the page itself.
    heading({ tokens, depth }) {
      const level = Math.min(depth + 2, 6);
      return `<h${level}>${this.parser.parseInline(tokens)}</h${level}>`;
    },
  },
});

purify.addHook("afterSanitizeAttributes", (node) => {
  if (node.nodeName === "A") {
    node.setAttribute("target", "_blank");
    node.setAttribute("rel", "noopener noreferrer nofollow");
  }
});

// The parser needs time that grows as the square of such a run, or of a text; of deep nesting, more stack than there is.
const LONGEST = 65_536;
const LONG_RUN = /[ \t]{500}|([^\w\s])\1{499}/;

export function rendered(text) {
  if (text.length <= LONGEST && !LONG_RUN.test(text)) {
    try {
      return purify.sanitize(parser.parse(text, { async: false }), POLICY);
    } catch {
      // It is shown as it is.
    }
  }
  const plain = document.createElement("pre");
  plain.textContent = text;
  return plain;
}

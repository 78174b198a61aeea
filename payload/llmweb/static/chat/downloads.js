// Conversations as files, which the browser makes by itself.
import { readable } from "./messages.js";
import { words } from "./page.js";

// With the roles and contents that a model was sent.
function plain({ title, system, changed, messages }) {
  const first = system ? [{ role: "system", content: system }] : [];
  const others = messages.map((each) => {
    const { role, model, thoughts, thumb } = each;
    return { role, content: readable(each), model, thoughts, thumb };
  });
  return { title, changed: new Date(changed).toISOString(), messages: [...first, ...others] };
}

function markdown(conversation) {
  const heads = { system: words("of_system"), user: words("of_user") };
  const parts = plain(conversation).messages.map(
    ({ role, content, model }) => `## ${heads[role] ?? words("of_model", { model })}\n\n${content}`,
  );
  return [`# ${conversation.title}`, ...parts].join("\n\n") + "\n";
}

const FORMATS = {
  json: { type: "application/json", text: (all) => JSON.stringify(all.map(plain), null, 2) },
  md: { type: "text/markdown", text: (all) => all.map(markdown).join("\n") },
};

// `format`: json or md. JSON has a list, also of one.
export function download(conversations, name, format) {
  const { type, text } = FORMATS[format];
  const link = document.createElement("a");
  link.href = URL.createObjectURL(new Blob([text(conversations)], { type }));
  link.download = `${name.replace(/[^\p{L}\p{N}]+/gu, "-").replace(/^-|-$/g, "") || "conversation"}.${format}`;
  link.click();
  setTimeout(() => URL.revokeObjectURL(link.href), 60_000); // the download has read it by then
}

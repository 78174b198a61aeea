// The question that is being written, with its files, and which earlier one it replaces.
import { amount, at, copy, say, words } from "./page.js";

const NAME_CHARACTERS = 200;

export class Composer {
  // `most`: bytes of a request, and so of a file.
  constructor(most) {
    this.most = most;
    this.files = [];
    this.target = null; // the message that is replaced
    at("#attach").addEventListener("change", async () => {
      const files = [...at("#attach").files];
      at("#attach").value = ""; // so that the same file can be chosen again
      const refusals = [];
      for (const file of files) refusals.push(await this.attach(file));
      this.list();
      say(refusals.filter(Boolean).join(" ") || words("attached", { count: amount(this.files.length) }));
    });
    at("#keep").addEventListener("click", () => {
      this.clear();
      at("#question").focus();
    });
  }

  // Why the file cannot be attached, if so.
  async attach(file) {
    const name = file.name.replace(/\s+/g, " ").slice(0, NAME_CHARACTERS);
    if (file.size > this.most) {
      return words("file_too_large", { name, size: amount(file.size), most: amount(this.most) });
    }
    let bytes;
    try {
      bytes = await file.arrayBuffer();
    } catch (error) {
      return words("file_unreadable", { name, message: error.message });
    }
    try {
      const text = new TextDecoder("utf-8", { fatal: true }).decode(bytes);
      if (text.includes("\0")) return words("file_binary", { name });
      this.files.push({ name, text });
    } catch {
      return words("file_binary", { name });
    }
  }

  list() {
    const items = this.files.map((file) => {
      const entry = copy("file-item");
      entry.querySelector("span").textContent = file.name;
      const remove = entry.querySelector("button");
      remove.setAttribute("aria-label", words("detach", { name: file.name }));
      remove.addEventListener("click", () => {
        this.files = this.files.filter((each) => each !== file);
        this.list();
        at("#attach").focus();
      });
      return entry;
    });
    at("#files").replaceChildren(...items);
    at("#editing").hidden = !this.target;
  }

  // `message`: whose text and files are written anew. `target`: the one that is replaced by them.
  fill(message, target = null) {
    at("#question").value = message.content;
    this.files = [...(message.files ?? [])];
    this.target = target;
    this.list();
  }

  clear() {
    this.fill({ content: "" });
  }

  get empty() {
    return !at("#question").value.trim() && !this.files.length;
  }

  get message() {
    const files = this.files.length ? { files: this.files } : {};
    return { role: "user", content: at("#question").value.trim(), ...files };
  }
}

// Documents of the collections that the reader may write: listed, added and removed.
import { Refusal } from "./gateway.js";
import { amount, at, copy, refused, say, words } from "./page.js";

const AGAIN = 3000; // milliseconds, while a document is being read
const panel = at("#documents");

export class Documents {
  // `gateway`: as chat.js asks it.
  constructor(gateway) {
    this.gateway = gateway;
    this.most = Infinity; // bytes of a file
    this.timer = 0;
    at("#collection").addEventListener("change", () => this.shown());
    panel.addEventListener("toggle", () => this.shown());
    at("#add-documents").addEventListener("change", async () => {
      const files = [...at("#add-documents").files];
      at("#add-documents").value = ""; // so that the same file can be chosen again
      at("#add-documents").disabled = true;
      const outcomes = [];
      for (const file of files) outcomes.push(await this.add(this.collection, file));
      await this.shown();
      say(outcomes.join(" "));
      at("#add-documents").disabled = false;
    });
  }

  get collection() {
    return at("#collection").value;
  }

  // Shows the panel to a reader who may write a collection, on a host that takes documents.
  async begin() {
    const { data, uploads, upload_bytes: most, suffixes } = await (await this.gateway.ask("GET", "collections")).json();
    const names = data.filter((each) => each.write).map((each) => each.id);
    if (!uploads || !names.length) return;
    this.most = most;
    at("#documents .note").textContent = words("documents_note", { suffixes: suffixes.join(", ") });
    at("#add-documents").accept = suffixes.join(",");
    at("#collection").replaceChildren(...names.map((name) => new Option(name)));
    panel.hidden = false;
  }

  async shown() {
    clearTimeout(this.timer);
    if (!panel.open) return;
    try {
      await this.list();
    } catch (error) {
      say(refused(error));
    }
  }

  async list() {
    const { collection } = this;
    const { data } = await (await this.gateway.ask("GET", this.path(collection))).json();
    if (collection !== this.collection) return; // another one has been chosen
    const items = data.map((each) => this.item(collection, each));
    at("#documents ul").replaceChildren(...items);
    if (!items.length) at("#documents ul").append(words("no_documents"));
    clearTimeout(this.timer);
    if (data.some((each) => each.status === "waiting")) this.timer = setTimeout(() => this.shown(), AGAIN);
  }

  path(collection, query = {}) {
    return `collections/${encodeURIComponent(collection)}/documents?${new URLSearchParams(query)}`;
  }

  item(collection, { id, name, status, passages, by, reason }) {
    const entry = copy("file-item");
    const values = { name, count: amount(passages), by: by || words("an_operator"), reason };
    entry.querySelector("span").textContent = words(`document_${status}`, values);
    const remove = entry.querySelector("button");
    remove.hidden = status === "waiting";
    remove.setAttribute("aria-label", words("remove_document", { name }));
    remove.addEventListener("click", () => this.remove(collection, id, name));
    return entry;
  }

  async remove(collection, document, name) {
    if (!confirm(words("document_really", { name, collection }))) return;
    try {
      await this.gateway.ask("DELETE", this.path(collection, { document }));
      say(words("document_removed", { name }));
    } catch (error) {
      say(refused(error));
      if (error.code !== "document_not_found") return;
    }
    await this.list();
    at("#add-documents").focus();
  }

  // How it ended, as a sentence.
  async add(collection, file) {
    const { name, size } = file;
    if (size > this.most) return words("document_too_large", { name, size: amount(size), most: amount(this.most) });
    const meter = at("#sent");
    meter.hidden = false;
    try {
      const { status } = await this.gateway.send(this.path(collection, { name }), file, (part) => {
        meter.value = part;
        say(part < 1 ? words("sending", { name, percent: amount(Math.floor(100 * part)) }) : words("reading", { name }));
      });
      return words(`document_${status}`, { name });
    } catch (error) {
      if (!(error instanceof Refusal)) throw error;
      const reason = error.code === "unreadable_document" ? error.message : refused(error);
      return words("not_added", { name, reason });
    } finally {
      meter.hidden = true;
    }
  }
}

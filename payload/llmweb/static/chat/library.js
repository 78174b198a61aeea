// The list of the kept conversations: open, search, save, delete.
import { download } from "./downloads.js";
import { amount, at, copy, say, words } from "./page.js";

const folded = (text) => text.normalize("NFKC").toLowerCase();

function matches(conversation, term) {
  const { title, system, messages } = conversation;
  const texts = messages.flatMap(({ content, files = [] }) => [content, ...files.flatMap((file) => [file.name, file.text])]);
  return [title, system ?? "", ...texts].some((text) => folded(text).includes(term));
}

export class Library {
  // `open` shows a conversation; `removing` is called before one is deleted, with its id, or before all are.
  constructor(kept, { open, removing }) {
    Object.assign(this, { kept, open, removing, conversations: [], items: [] });
    at("#search").addEventListener("input", () => {
      this.search();
      say(words("matches", { count: amount(this.matching.length), all: amount(this.items.length) }));
    });
    for (const button of document.querySelectorAll("#save-all [data-format]")) {
      button.addEventListener("click", () => download(this.conversations, words("all_named"), button.dataset.format));
    }
    at("#delete-all").addEventListener("click", async () => {
      this.removing();
      await this.kept.clear();
      await this.deleted();
    });
  }

  async list() {
    this.conversations = await this.kept.all();
    this.items = this.conversations.map((each) => this.item(each));
    at("#conversations ul").replaceChildren(...this.items);
    at("#all").hidden = !this.items.length;
    this.search();
  }

  item(conversation) {
    const item = copy("conversation-item");
    const { id, title } = conversation;
    const open = item.querySelector(".open");
    open.textContent = title;
    open.addEventListener("click", () => this.open(conversation));
    for (const save of item.querySelectorAll("[data-format]")) {
      save.setAttribute("aria-label", words("save_named", { title, format: save.textContent }));
      save.addEventListener("click", () => download([conversation], title, save.dataset.format));
    }
    const remove = item.querySelector(".delete");
    remove.setAttribute("aria-label", words("delete_named", { title }));
    remove.addEventListener("click", async () => {
      this.removing(id);
      await this.kept.remove(id);
      await this.deleted();
    });
    return item;
  }

  async deleted() {
    await this.list();
    at("#conversations summary").focus();
    say(words("deleted"));
  }

  search() {
    const term = folded(at("#search").value.trim());
    this.conversations.forEach((each, number) => {
      this.items[number].hidden = Boolean(term) && !matches(each, term);
    });
  }

  get matching() {
    return this.items.filter((each) => !each.hidden);
  }
}

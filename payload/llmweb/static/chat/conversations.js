// Conversations in this browser's IndexedDB, by who is signed in. Never a key, nor anything of the session.
const NAME = "llmkeep-conversations";

function settled(request) {
  return new Promise((resolve, reject) => {
    request.onsuccess = () => resolve(request.result);
    request.onerror = () => reject(request.error);
  });
}

export class Conversations {
  constructor(database, subject) {
    this.database = database;
    this.subject = subject;
    this.gone = new Set(); // ids of those that were deleted, which an answer or a rating may still come to
  }

  static async open(subject) {
    const request = indexedDB.open(NAME, 1);
    request.onupgradeneeded = () => {
      request.result.createObjectStore(NAME, { keyPath: "id" }).createIndex("subject", "subject");
    };
    return new Conversations(await settled(request), subject);
  }

  store(mode) {
    return this.database.transaction(NAME, mode).objectStore(NAME);
  }

  // The newest first.
  async all() {
    const found = await settled(this.store("readonly").index("subject").getAll(this.subject));
    return found.sort((one, other) => other.changed - one.changed);
  }

  async put(conversation) {
    if (this.gone.has(conversation.id)) return;
    const store = this.store("readwrite");
    const putting = store.put({ ...conversation, subject: this.subject, changed: Date.now() });
    store.transaction.commit(); // at once: a reload ends one that has not begun to
    await settled(putting);
  }

  remove(id) {
    this.gone.add(id);
    return settled(this.store("readwrite").delete(id));
  }

  async clear() {
    for (const { id } of await this.all()) await this.remove(id);
  }
}

// Where a browser stores nothing.
export class Unkept {
  async all() {
    return [];
  }
  async put() {}
  async remove() {}
  async clear() {}
}

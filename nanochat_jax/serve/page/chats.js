// Chats kept in the browser, each under a key of its own, so that tabs rarely meet in one.
//
// A chat is {id, title, system, changed, messages}; a message {id, parent, role, parts, shown,
// changed, ...}. Messages form a tree: those with one parent are versions of each other, and the
// one shown last is the one that the chat goes on from. Nothing is taken out of a chat but by
// deleting it whole, so two tabs' copies join into one without losing either's messages.

const PREFIX = "nanochat.chat.";
const KINDS = ["text", "python", "python_output"];

export const chats = new Map(); // id -> chat, also those that the store had no room for
export const newId = () => crypto.getRandomValues(new Uint32Array(3)).join("-");

export function newChat(system = "") {
  return { id: newId(), title: "", system, changed: Date.now(), messages: [] };
}

export function add(chat, parent, role, parts) {
  const message = { id: newId(), parent, role, parts, shown: 0, changed: Date.now() };
  chat.messages.push(message);
  chat.title ||= plain(message).trim().slice(0, 80);
  show(chat, message);
  return message;
}

export function show(chat, message) {
  message.shown = Math.max(Date.now(), ...versions(chat, message).map((one) => one.shown + 1));
}

export const versions = (chat, message) =>
  chat.messages.filter((one) => one.parent === message.parent);

/** The messages from the first to `end`; without it, those that the chat shows. */
export function path(chat, end) {
  if (end) {
    const before = chat.messages.find((one) => one.id === end.parent);
    return before ? [...path(chat, before), end] : [end];
  }
  const found = [];
  for (let id = ""; ; id = found.at(-1).id) {
    const next = chat.messages.filter((one) => one.parent === id);
    if (!next.length) return found;
    found.push(next.reduce((a, b) => (b.shown > a.shown ? b : a)));
  }
}

/** What a message says, without the tool's parts. */
export const plain = (message) =>
  message.parts.filter((part) => part.type === "text").map((part) => part.text).join("");

export function search(words) {
  const wanted = words.toLowerCase().trim();
  const has = (text) => text.toLowerCase().includes(wanted);
  return [...chats.values()]
    .filter((chat) => has(chat.title) || chat.messages.some((message) => has(plain(message))))
    .sort((a, b) => b.changed - a.changed);
}

/** Read all that is kept; returns how many keys hold something that is no chat (left there). */
export function load() {
  chats.clear();
  const keys = Object.keys(localStorage).filter((key) => key.startsWith(PREFIX));
  for (const key of keys) {
    const chat = read(localStorage.getItem(key));
    if (chat) chats.set(chat.id, chat);
  }
  return keys.length - chats.size;
}

/** Keep a chat, joined with what another tab has written to it. Throws if the store is full. */
export function save(chat) {
  chats.set(chat.id, chat);
  const kept = read(localStorage.getItem(PREFIX + chat.id));
  if (kept) join(chat, kept);
  localStorage.setItem(PREFIX + chat.id, JSON.stringify(chat));
}

export function remove(id) {
  chats.delete(id);
  localStorage.removeItem(PREFIX + id);
}

/** Call `changed(id)` when another tab has written or deleted a chat; id null: all of them. */
export function watch(changed) {
  addEventListener("storage", ({ key, newValue }) => {
    if (key === null) load();
    else if (!key.startsWith(PREFIX)) return;
    const id = key?.slice(PREFIX.length) ?? null;
    const chat = read(newValue);
    if (chat && chats.has(id)) join(chats.get(id), chat);
    else if (chat) chats.set(id, chat);
    else if (id) chats.delete(id);
    changed(id);
  });
}

export const exported = () => JSON.stringify({ nanochat: 1, chats: [...chats.values()] }, null, 1);

/** Take in what `exported` gave; [how many chats, how many that were refused]. */
export function taken(text) {
  const list = JSON.parse(text)?.chats;
  if (!Array.isArray(list)) throw new Error("there are no chats in it");
  const sound = list.map((one) => read(JSON.stringify(one))).filter((chat) => chat);
  for (const chat of sound) {
    const have = chats.get(chat.id);
    if (have) join(have, chat);
    save(have ?? chat);
  }
  return [sound.length, list.length - sound.length];
}

/** Text as a chat, or null: the store and imported files may hold anything. */
function read(text) {
  let chat;
  try {
    chat = JSON.parse(text);
  } catch {
    return null;
  }
  const string = (value) => typeof value === "string";
  const isPart = (part) => KINDS.includes(part?.type) && string(part.text);
  const isMessage = (one) =>
    string(one?.id) && one.id && string(one.parent) && ["user", "assistant"].includes(one.role) &&
    Array.isArray(one.parts) && one.parts.every(isPart) &&
    Number.isFinite(one.shown) && Number.isFinite(one.changed);
  const isChat =
    string(chat?.id) && string(chat.title) && string(chat.system) &&
    Number.isFinite(chat.changed) && Array.isArray(chat.messages) && chat.messages.every(isMessage);
  return isChat && isTree(chat.messages) ? chat : null;
}

/** Each message comes after its parent, which also means that no way through them is a circle. */
function isTree(messages) {
  const seen = new Set([""]);
  return messages.every((one) => seen.has(one.parent) && !seen.has(one.id) && seen.add(one.id));
}

/** Put the other copy's messages and newer states into `chat`. */
function join(chat, other) {
  const own = new Map(chat.messages.map((message) => [message.id, message]));
  for (const message of other.messages) {
    const mine = own.get(message.id);
    if (!mine) chat.messages.push(message);
    else {
      const shown = Math.max(mine.shown, message.shown);
      if (message.changed > mine.changed) Object.assign(mine, message);
      mine.shown = shown;
    }
  }
  if (other.changed > chat.changed) {
    const { title, system, changed } = other;
    Object.assign(chat, { title, system, changed });
  }
}

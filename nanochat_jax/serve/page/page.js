// The chat page: what is open, what is being written, and what the buttons do.

import * as api from "./api.js";
import * as store from "./chats.js";
import { ask, applyTheme, edit as editSettings, keep, load, settings } from "./settings.js";
import { copied, copies, draw, make } from "./view.js";
import { endOf, write as answer } from "./writer.js";

const by = (id) => document.getElementById(id);
const sleep = (secs) => new Promise((resolve) => setTimeout(resolve, 1000 * secs));
const SAVE_EVERY_MSECS = 500;
const PROMPTS = ["Who are you?", "What is 12+30?", "Spell the word banana.", "Hi! How was your day?"];
const BEGINNINGS = ["Once upon a time", "My favorite food is", "I think that", "The function returns"];

const writing = new Map(); // message id -> the AbortController of the answer being written
const articles = new Map(); // message id -> its element, of the open chat
let model = {}; // what the server says of its model
let chat = store.newChat();
let follow = true; // the end of the conversation stays in sight
let lastSave = 0;
let leaving = false;
const unseenLine = make("p", "line", "The context is full: the model no longer sees what is above.");

// --- Drawing

function drawChat() {
  const shown = store.path(chat);
  articles.clear();
  by("thread").replaceChildren(...shown.map(article));
  if (!shown.length) by("thread").append(welcome());
  markUnseen();
  drawComposer();
  drawList();
  if (document.activeElement === document.body) focusField();
}

/** Draw anew what is there already, unless other messages are to be shown. */
function refresh() {
  const ids = (keys) => [...keys].join();
  const shown = store.path(chat);
  if (ids(shown.map((one) => one.id)) !== ids(articles.keys())) drawChat();
  else for (const message of shown) redraw(message);
}

/** Say where the part of the conversation begins that the model has last seen. */
function markUnseen() {
  const shown = store.path(chat);
  const last = shown.findLast((message) => message.role === "assistant");
  const next = last?.unseen ? articles.get(shown[2 * last.unseen]?.id) : null;
  if (!next) unseenLine.remove();
  else if (next.previousSibling !== unseenLine) next.before(unseenLine);
}

function article(message) {
  const element = copied("message");
  const on = (name, action) => element.querySelector(name).addEventListener("click", action);
  on(".older", () => turn(message, -1));
  on(".newer", () => turn(message, 1));
  on(".edit", () => edit(message, element));
  on(".again", () => current() || write(chat, store.add(chat, message.parent, "assistant", [])));
  on(".on", () => current() || write(chat, message));
  copies(element.querySelector(".copy"), () => store.plain(message));
  articles.set(message.id, element);
  redraw(message, element);
  return element;
}

function redraw(message, element = articles.get(message.id)) {
  if (element) draw(element, chat, message, model, writing.has(message.id));
}

function welcome() {
  const element = copied("welcome");
  const base = model.chat === false;
  element.querySelector("h2").textContent = base ? "Begin a text" : "Say hello";
  element.querySelector("p").textContent = base
    ? "This is a base model: it answers no questions, it goes on with what you write."
    : "A small model, trained from scratch. It chats, spells and does sums, and it makes things up.";
  for (const text of base ? BEGINNINGS : PROMPTS) {
    const button = make("button", "", text);
    button.addEventListener("click", () => send(text));
    element.querySelector(".prompts").append(button);
  }
  return element;
}

function drawComposer() {
  const busy = Boolean(current());
  by("send").hidden = busy;
  by("stop").hidden = !busy;
  const label = model.chat === false ? "Text to go on with" : "Message";
  by("ask-label").textContent = by("ask").placeholder = label;
}

function drawList() {
  const found = store.search(by("search").value);
  by("chats").replaceChildren(...found.map(listed));
  const none = store.chats.size ? "No chat has these words." : "Chats stay in this browser.";
  by("none").textContent = found.length ? "" : none;
  document.title = chat.title ? `${chat.title} - nanochat` : "nanochat";
}

function listed(one) {
  const item = copied("chat");
  const [title, rename, bin] = item.children;
  const name = (title.textContent = one.title || "No title");
  title.setAttribute("aria-current", one.id === chat.id);
  rename.setAttribute("aria-label", `Rename ${name}`);
  bin.setAttribute("aria-label", `Delete ${name}`);
  title.addEventListener("click", () => open(one));
  rename.addEventListener("click", async () => {
    const said = await ask("Rename this chat", { label: "Name", value: one.title, ok: "Rename" });
    if (!said) return;
    Object.assign(one, { title: said.slice(0, 80), changed: Date.now() });
    save(one);
    drawList();
  });
  bin.addEventListener("click", async () => {
    if (!(await ask(`Delete "${name}"?`, { ok: "Delete" }))) return;
    stopAll(one);
    store.remove(one.id);
    if (one.id === chat.id) open();
    else drawList();
  });
  return item;
}

/** One line above the conversation; empty: none. */
function tell(text) {
  by("banner").textContent = text;
  by("banner").hidden = !text;
}

const say = (text) => (by("said").textContent = text); // for those who hear the page

// --- Chats

function open(one = store.newChat(settings.system)) {
  chat = one;
  history.replaceState(null, "", store.chats.has(one.id) ? `#${one.id}` : location.pathname);
  follow = true;
  showSide(false);
  drawChat();
  focusField();
}

/** Do what writes to the browser's store, which may be full or not allowed. */
function kept(action) {
  try {
    return action();
  } catch (error) {
    tell(`The browser keeps nothing more (${error.name}). Export your chats, then delete some.`);
  }
}

function save(one) {
  lastSave = Date.now();
  kept(() => store.save(one));
}

function turn(message, step) {
  const all = store.versions(chat, message);
  const next = all[all.indexOf(message) + step];
  store.show(chat, next);
  save(chat);
  drawChat();
  articles.get(next.id).querySelector(".versions :enabled").focus();
}

function edit(message, element) {
  const form = make("form", "editor");
  const field = make("textarea", "");
  field.value = store.plain(message);
  field.setAttribute("aria-label", "Edit your message");
  const cancel = make("button", "", "Cancel");
  cancel.type = "button";
  form.append(field, cancel, make("button", "main", "Send"));
  cancel.addEventListener("click", drawChat);
  form.addEventListener("submit", (event) => {
    event.preventDefault();
    if (field.value.trim()) send(field.value, message.parent);
  });
  submitsOnEnter(field);
  element.replaceChildren(form);
  field.focus();
}

const isEditing = () => Boolean(document.querySelector(".editor"));

// --- Answers

/** The answer that is being written in the open chat, if there is one. */
const current = () => chat.messages.find((message) => writing.has(message.id));
const stopAll = (one) => one.messages.forEach(({ id }) => writing.get(id)?.abort());

function send(text, parent = store.path(chat).at(-1)?.id ?? "") {
  if (current()) return;
  const asked = store.add(chat, parent, "user", [{ type: "text", text: text.trim() }]);
  chat.changed = Date.now();
  history.replaceState(null, "", `#${chat.id}`);
  follow = true;
  write(chat, store.add(chat, asked.id, "assistant", []));
}

/** Let the model write into `message`, and show how it gets on. */
async function write(one, message) {
  const controller = new AbortController();
  writing.set(message.id, controller);
  one.changed = Date.now();
  const ended = answer(message, store.path(one, message), one.system, model, {
    signal: controller.signal,
    askKey,
    progress: () => {
      redraw(message);
      markUnseen();
      if (message.waiting) say("The server's queue is full. Waiting.");
      const isDue = Date.now() - lastSave > SAVE_EVERY_MSECS;
      if (isDue && store.chats.has(one.id)) save(one); // it may have been deleted meanwhile
    },
  });
  save(one);
  drawChat();
  say("The model writes.");
  await ended;
  writing.delete(message.id);
  if (leaving) return; // with the page goes its connection: that is no news of the server
  if (message.finish === "cut") lost();
  if (store.chats.has(one.id)) save(one);
  say(`The model says: ${store.plain(message)} ${endOf(message, model)}`);
  redraw(message);
  drawComposer();
  drawList();
}

async function askKey() {
  const key = await ask("This server asks for an API key", { label: "API key", type: "password" });
  if (key) api.keepKey(key);
  return key;
}

// --- The server

async function meet() {
  try {
    const [card] = await api.models();
    model = card;
    by("name").textContent = card.id;
    const run = card.id.slice(0, -`-${card.stage}`.length);
    by("report").href = `report/${encodeURIComponent(run)}`;
    const [tool] = card.tools; // the one that it has unasked
    by("facts").textContent = `stage ${card.stage}, step ${card.step}, context of ${card.context} `
      + `tokens${card.chat && tool && tool !== "none" ? `, with a ${tool}` : ""}`;
    document.body.dataset.server = "here";
    tell("");
    if (!isEditing()) drawChat();
  } catch (error) {
    if (error.status === 401 && (await askKey())) await meet();
    else if (error.status === 0 || error.status === 503) lost();
    else tell(error.message);
  }
}

/** The server is gone: say so, and look until it is back. */
async function lost() {
  if (document.body.dataset.server === "gone") return;
  document.body.dataset.server = "gone";
  tell("The server is gone. Your chats are kept here; this page goes on when it is back.");
  while (!(await api.isHealthy())) await sleep(1.5);
  document.body.dataset.server = "";
  await meet();
  say("The server is back.");
}

async function lookAgain() {
  if (document.hidden || writing.size || document.body.dataset.server === "gone") return;
  if (!(await api.isHealthy())) lost();
}

// --- What the user does

function submitsOnEnter(field) {
  const grow = () => {
    field.style.height = "auto";
    field.style.height = `${field.scrollHeight + 2}px`;
  };
  field.addEventListener("input", grow);
  field.addEventListener("keydown", (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    field.form.requestSubmit();
  });
  requestAnimationFrame(grow);
}

function focusField() {
  if (matchMedia("(hover: hover)").matches) by("ask").focus(); // phones would open their keyboard
}

function showSide(shown) {
  by("side").classList.toggle("open", shown);
  by("open-side").setAttribute("aria-expanded", shown);
}

by("composer").addEventListener("submit", (event) => {
  event.preventDefault();
  const text = by("ask").value;
  if (!text.trim() || current()) return;
  by("ask").value = "";
  by("ask").dispatchEvent(new Event("input"));
  send(text);
});
by("stop").addEventListener("click", () => {
  stopAll(chat);
  by("ask").focus();
});
by("new").addEventListener("click", () => open());
by("search").addEventListener("input", drawList);
by("open-side").addEventListener("click", () => {
  showSide(true);
  by("new").focus();
});
by("side").addEventListener("focusout", ({ relatedTarget: next }) => {
  if (next && !next.closest("#side, dialog")) showSide(false);
});
by("shade").addEventListener("click", () => showSide(false));
by("open-settings").addEventListener("click", async () => {
  await editSettings(chat, model);
  kept(keep);
  if (chat.messages.length) save(chat);
  drawChat();
});
by("theme").addEventListener("change", (event) => {
  settings.theme = event.target.value;
  applyTheme();
  kept(keep);
});
by("export").addEventListener("click", () => {
  const link = make("a", "");
  link.href = URL.createObjectURL(new Blob([store.exported()], { type: "application/json" }));
  link.download = "nanochat-chats.json";
  link.click();
  URL.revokeObjectURL(link.href);
});
by("import").addEventListener("click", () => by("file").click());
by("file").addEventListener("change", async ({ target }) => {
  try {
    const [taken, refused] = store.taken(await target.files[0].text());
    tell(`Chats taken in: ${taken}. Left out because they are damaged: ${refused}.`);
  } catch (error) {
    tell(`This file could not be read as chats: ${error.message}`);
  }
  target.value = "";
  drawChat();
});
document.addEventListener("keydown", (event) => {
  if (event.key !== "Escape" || document.querySelector("dialog[open]")) return;
  if (by("side").classList.contains("open")) {
    showSide(false);
    by("open-side").focus();
  } else stopAll(chat);
});
document.addEventListener("visibilitychange", lookAgain);
addEventListener("pagehide", () => {
  leaving = true;
  if (current()) save(chat);
});
addEventListener("pageshow", ({ persisted }) => persisted && location.reload());
addEventListener("hashchange", () => {
  const asked = store.chats.get(location.hash.slice(1));
  if (asked) open(asked);
});

const log = by("log");
log.addEventListener("scroll", () => {
  follow = log.scrollHeight - log.scrollTop - log.clientHeight < 60;
});
new ResizeObserver(() => follow && log.scrollTo(0, log.scrollHeight)).observe(by("thread"));

store.watch((id) => {
  if (id === null || id === chat.id) {
    if (!store.chats.has(chat.id)) {
      if (!chat.messages.length) return;
      stopAll(chat);
      tell("This chat was deleted in another tab.");
      open();
    } else if (!current() && !isEditing()) refresh();
  }
  drawList();
});

kept(load);
submitsOnEnter(by("ask"));
const damaged = kept(store.load);
open(store.chats.get(location.hash.slice(1)));
meet().then(() => {
  if (damaged) tell(`${damaged} of the kept chats cannot be read; they were left as they are.`);
});
setInterval(lookAgain, 10_000);

// A message on the page. What a model or a user says is set as text; HTML comes from the server's
// sanitizer alone, and all of it through `setHtml`.

import { rendered } from "./api.js";
import { plain, versions } from "./chats.js";
import { endOf } from "./writer.js";

const html = new Map(); // text -> its HTML, for as long as the page is open
const wanted = new WeakMap(); // element -> the text that it is to show
const PAUSE_MSECS = 250;
let queue = Promise.resolve(); // one text is rendered at a time

/** A copy of what a <template> holds. */
export function copied(id) {
  const element = document.getElementById(id).content.firstElementChild.cloneNode(true);
  for (const named of element.querySelectorAll("[aria-label]")) named.title = named.ariaLabel;
  return element;
}

/** An element with text in it. */
export function make(tag, className, text = "") {
  const element = document.createElement(tag);
  element.className = className;
  element.textContent = text;
  return element;
}

/** Text to the clipboard; where a browser gives none (plain http), by the old way. */
export async function copy(text) {
  if (navigator.clipboard) return navigator.clipboard.writeText(text);
  const field = make("textarea", "spoken", text);
  document.body.append(field);
  field.select();
  document.execCommand("copy");
  field.remove();
}

/** A button copies `text()` and says so for a moment. */
export function copies(button, text) {
  button.addEventListener("click", async () => {
    await copy(text());
    document.getElementById("said").textContent = "Copied.";
    button.classList.add("done");
    setTimeout(() => button.classList.remove("done"), 1500);
  });
}

/** Fill an article made from the template with the message as it is now. */
export function draw(article, chat, message, model, writing) {
  const mine = message.role === "user";
  article.className = mine ? "user" : "assistant";
  article.classList.toggle("writing", writing);
  article.setAttribute("aria-busy", writing);
  article.querySelector("h2").textContent = mine ? "You" : "Model";
  const body = article.querySelector(".body");
  const groups = grouped(message.parts);
  groups.forEach((group, at) => {
    if (!body.children[at]) body.append(made(group));
    fill(body.children[at], group, mine || model.chat === false, writing);
  });
  const note = noteOf(message, model, writing);
  article.querySelector(".note").textContent = note;
  article.querySelector(".note").hidden = !note;
  const all = versions(chat, message);
  article.querySelector(".versions").hidden = all.length < 2;
  article.querySelector(".which").textContent = `${all.indexOf(message) + 1}/${all.length}`;
  article.querySelector(".older").disabled = all[0] === message;
  article.querySelector(".newer").disabled = all.at(-1) === message;
  article.querySelector(".edit").hidden = !mine;
  article.querySelector(".again").hidden = mine;
  const cut = ["length", "stopped", "cut"].includes(message.finish) || !message.finish;
  const endless = model.chat === false && message.finish === "stop";
  article.querySelector(".on").hidden = mine || !(cut || endless) || !plain(message);
  article.querySelector(".speed").textContent = speedOf(message);
}

/** Parts as the page shows them: a text, or a call of a tool with its result. */
function grouped(parts) {
  const groups = [];
  for (const { type, text } of parts) {
    const last = groups.at(-1);
    if (type === "text") groups.push({ text });
    else if (type === "python_output" && last?.call !== undefined && last.result === undefined)
      last.result = text;
    else groups.push(type === "python" ? { call: text } : { call: "", result: text });
  }
  return groups;
}

function made(group) {
  if (group.text !== undefined) return make("div", "text plain");
  const details = make("details", "tool");
  details.append(make("summary", ""), make("h3", "", "The model asked"), make("pre", "call"));
  details.append(make("h3", "", "The tool answered"), make("pre", "result"));
  for (const pre of details.querySelectorAll("pre")) pre.tabIndex = 0;
  return details;
}

function fill(element, group, asItIs, writing) {
  if (group.text === undefined) {
    const short = (text) => (text.length > 60 ? `${text.slice(0, 60)} ...` : text);
    const [summary, , call, , result] = element.children;
    summary.textContent = `Tool: ${short(group.call)}`;
    if (group.result !== undefined) summary.textContent += ` = ${short(group.result)}`;
    call.textContent = group.call;
    result.textContent = group.result ?? (writing ? "nothing yet" : "nothing: it cannot work this out");
  } else if (asItIs) element.textContent = group.text;
  else renderInto(element, group.text);
}

/** Show `text` rendered: at once if it is known, else as soon as the server has done so. */
async function renderInto(element, text) {
  const busy = wanted.has(element);
  wanted.set(element, text);
  if (html.has(text)) {
    if (!busy) wanted.delete(element); // no loop will: this is already what it shows
    return setHtml(element, text);
  }
  if (element.classList.contains("plain")) element.textContent = text;
  if (busy) return; // the loop below, already running for this element, sees the new text
  for (let done; done !== wanted.get(element); ) {
    done = wanted.get(element);
    try {
      queue = queue.catch(() => {}).then(() => html.get(done) ?? rendered(done));
      html.set(done, await queue);
      setHtml(element, done);
    } catch {
      element.classList.add("plain"); // a text without its marks is still the text
      element.textContent = wanted.get(element);
    }
    await new Promise((resolve) => setTimeout(resolve, PAUSE_MSECS));
    if (done !== wanted.get(element)) html.delete(done);
  }
  wanted.delete(element);
}

function setHtml(element, text) {
  element.classList.remove("plain");
  element.innerHTML = html.get(text);
  for (const table of element.querySelectorAll("table")) {
    const box = make("div", "scroll");
    box.tabIndex = 0;
    table.replaceWith(box);
    box.append(table);
  }
  for (const pre of element.querySelectorAll("pre")) {
    const box = make("div", "code");
    const button = make("button", "", "Copy");
    copies(button, () => pre.textContent);
    pre.tabIndex = 0;
    pre.replaceWith(box);
    box.append(pre, button);
  }
}

function noteOf(message, model, writing) {
  if (message.role === "user") return "";
  return writing ? (message.waiting ?? "") : endOf(message, model);
}

function speedOf({ tokens, secs }) {
  if (!tokens || !secs) return "";
  return `${tokens} tokens, ${(tokens / secs).toFixed(tokens / secs < 10 ? 1 : 0)} tokens/s`;
}

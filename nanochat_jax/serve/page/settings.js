// The two dialogs: how answers are sampled, and one question with one line for an answer.

const KEY = "nanochat.settings";
const DEFAULTS = { temperature: 0.6, top_p: 1, top_k: 50, max_tokens: 512, seed: null, tool: "" };
const by = (id) => document.getElementById(id);

/** What the user has chosen, also the system prompt of new chats and the theme. */
export const settings = { ...DEFAULTS, system: "", theme: "" };

export function load() {
  try {
    const kept = JSON.parse(localStorage.getItem(KEY)) ?? {};
    for (const [name, value] of Object.entries(settings)) {
      const sound = typeof kept[name] === typeof value || (name === "seed" && Number.isInteger(kept[name]));
      if (sound) settings[name] = kept[name];
    }
  } catch {
    // A damaged entry is as good as none: the defaults stand, and the next change replaces it.
  }
  by("theme").value = settings.theme;
  applyTheme();
}

export function applyTheme() {
  document.documentElement.dataset.theme = settings.theme;
}

export function keep() {
  localStorage.setItem(KEY, JSON.stringify(settings));
}

/** Show the dialog; resolves when it is closed, with the settings changed. */
export async function edit(chat, model) {
  const tool = by("tool");
  tool.replaceChildren(new Option("as trained", ""));
  for (const name of model.tools ?? []) tool.append(new Option(name, name));
  const show = (values) => {
    for (const name of Object.keys(DEFAULTS)) by(name).value = values[name] ?? "";
    if (tool.selectedIndex < 0) tool.value = ""; // this model has no such tool
  };
  show(settings);
  by("system").value = chat.system;
  by("system").disabled = tool.disabled = model.chat === false;
  by("defaults").onclick = () => show(DEFAULTS);
  await closed(by("settings"));
  for (const name of Object.keys(DEFAULTS)) {
    const field = by(name);
    if (name === "tool") settings.tool = field.value;
    else if (field.validity.valid) settings[name] = field.value === "" ? null : +field.value;
  }
  settings.system = chat.system = by("system").value.trim();
}

/** Ask for a line of text, or with no label for a yes; null if the user would rather not. */
export async function ask(title, { label = "", value = "", ok = "OK", type = "text" } = {}) {
  const dialog = by("question");
  const input = dialog.querySelector("input");
  by("question-title").textContent = title;
  dialog.querySelector("label").hidden = !label;
  dialog.querySelector("label span").textContent = label;
  dialog.querySelector(".main").textContent = ok;
  Object.assign(input, { value, type, required: Boolean(label) });
  dialog.querySelector(".cancel").onclick = () => dialog.close();
  dialog.returnValue = "";
  const closing = closed(dialog);
  input.select();
  await closing;
  const said = input.value.trim() || "yes";
  input.value = "";
  return dialog.returnValue === "ok" ? said : null;
}

function closed(dialog) {
  dialog.showModal();
  return new Promise((resolve) => dialog.addEventListener("close", resolve, { once: true }));
}

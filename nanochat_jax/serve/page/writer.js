// An answer: what is asked of the server for it, and what the server's events put into it.

import * as api from "./api.js";
import { plain } from "./chats.js";
import { settings } from "./settings.js";

/**
 * Let the model write into `message`, the last of `turns`, from where its parts end.
 *
 * Never throws: `message.finish` says how it ended. While the queue is full it waits and tries again
 * when the server said to. `progress()` is called after each change, `askKey()` when a key is asked
 * for; it resolves to whether there is a new one.
 */
export async function write(message, turns, system, model, { signal, progress, askKey }) {
  const change = (changes) => {
    Object.assign(message, changes, { changed: Date.now() });
    progress();
  };
  const tick = (left) =>
    change({ waiting: `The server's queue is full. Trying again in ${left} s.` });
  Object.assign(message, { finish: "", error: "", waiting: "", tokens: 0, secs: 0 });
  while (!message.finish) {
    try {
      const [path, body] = await request(message, turns, system, model);
      const start = performance.now();
      for await (const chunk of api.stream(path, body, signal)) {
        take(chunk, message, body.max_tokens);
        change({ waiting: "", secs: (performance.now() - start) / 1000 });
      }
      message.finish ||= "stop";
    } catch (error) {
      if (error.status === 401 && (await askKey())) continue;
      if (error.status === 429) await wait(Math.max(1, error.secs), signal, tick);
      else if (error.name === "AbortError") message.finish = "stopped";
      else if (error.status === 0) message.finish = "cut";
      else Object.assign(message, { finish: "error", error: reason(error, model) });
      if (signal.aborted) message.finish = "stopped";
    }
  }
  change({ waiting: "" });
}

/** [path, body] that ask for the rest of `message`. */
async function request(message, turns, system, model) {
  const { temperature, top_p, top_k, max_tokens, seed, tool } = settings;
  const body = { model: model.id, temperature, top_p, top_k, max_tokens };
  body.seed = seed ?? Math.floor(Math.random() * 2 ** 31);
  body.stream_options = { include_usage: true };
  if (model.chat === false) {
    body.prompt = turns.slice(-2).map(plain).join("");
    return ["v1/completions", body];
  }
  if (tool) body.tool = tool;
  const first = system ? [{ role: "system", content: system }] : [];
  const said = turns.map(({ role, parts }) => ({ role, content: parts }));
  if (!message.parts.length) said.pop();
  // As in chat_cli, the oldest turns go out until an answer of half a context fits.
  const room = Math.min(max_tokens, Math.floor(model.context / 2));
  message.unseen = 0;
  while (said.length > 2 && (await numTokens([...first, ...said])) + room > model.context) {
    said.splice(0, 2);
    message.unseen += 1;
  }
  return ["v1/chat/completions", { ...body, messages: [...first, ...said] }];
}

/** About how many tokens messages take, with those around them and around calls of tools. */
async function numTokens(messages) {
  const texts = messages.flatMap(({ content }) => content.map?.((part) => part.text) ?? [content]);
  return (await api.numTokens(texts.join("\n"))) + 2 * (messages.length + texts.length);
}

/** Put what an event brings into the message. */
function take({ choices: [choice], usage }, message, maxTokens) {
  const text = choice?.delta?.content ?? choice?.text ?? "";
  for (const part of choice?.delta?.parts ?? [{ type: "text", text }]) {
    const last = message.parts.at(-1);
    if (last?.type === part.type && !part.new) last.text += part.text;
    else if (part.text || part.new) message.parts.push({ type: part.type, text: part.text });
  }
  if (choice?.finish_reason) message.finish = choice.finish_reason;
  if (!usage) return;
  message.tokens = usage.completion_tokens;
  if (message.finish === "length" && message.tokens < maxTokens) message.finish = "context";
}

async function wait(secs, signal, tick) {
  for (let left = Math.ceil(secs); left > 0 && !signal.aborted; left -= 1) {
    tick(left);
    await new Promise((resolve) => setTimeout(resolve, 1000));
  }
}

function reason(error, model) {
  if (error.code === "context_length_exceeded")
    return `The context is full: this is too long for the ${model.context} tokens that the model `
      + "sees at a time. Shorten the message, or begin a new chat.";
  return error.status ? error.message : `The page failed: ${error}`;
}

/** What there is to say about how an answer ended; empty for one that came to its own end. */
export function endOf(message, model) {
  const ends = {
    stop: "",
    length: model.chat === false
      ? "" // a base model finds no end of its own
      : `Cut off after ${message.tokens} tokens, the most that Settings allow.`,
    context: `Cut off: the context of ${model.context} tokens is full.`,
    stopped: "Stopped.",
    cut: `The server ${message.parts.length ? "went away while it wrote this" : "is gone"}.`,
    error: message.error,
  };
  return ends[message.finish] ?? "Not finished.";
}

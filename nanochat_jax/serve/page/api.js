// The server's API: answers as events, Markdown as sanitized HTML, and errors with their reasons.

const KEY = "nanochat.key"; // an API key stays for as long as the tab

export class ApiError extends Error {
  /** status 0: no server answered; secs: when to try again, where the server said so. */
  constructor(status, message, { code = "", secs = 0 } = {}) {
    super(message);
    Object.assign(this, { status, code, secs });
  }
}

export const keepKey = (key) => sessionStorage.setItem(KEY, key);

async function call(path, body, signal) {
  const headers = { "Content-Type": "application/json" };
  const key = sessionStorage.getItem(KEY);
  if (key) headers.Authorization = `Bearer ${key}`;
  const method = body ? "POST" : "GET";
  const options = { method, headers, signal, body: body && JSON.stringify(body) };
  const response = await reached(fetch(path, options));
  if (response.ok) return response;
  const error = (await response.json().catch(() => ({}))).error ?? {};
  throw new ApiError(response.status, error.message ?? `The server answered ${response.status}.`, {
    code: error.code ?? "",
    secs: Number(response.headers.get("Retry-After")) || 0,
  });
}

/** What the network promises, with "no server" as an ApiError; a stop of ours stays what it is. */
async function reached(promise) {
  try {
    return await promise;
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiError(0, "The server cannot be reached.");
  }
}

export async function models() {
  return (await (await call("v1/models")).json()).data;
}

export async function isHealthy() {
  try {
    return (await fetch("health", { signal: AbortSignal.timeout(8000) })).ok;
  } catch {
    return false;
  }
}

export async function rendered(text) {
  const response = await call("render", { text }, AbortSignal.timeout(8000));
  return (await response.json()).html;
}

export async function numTokens(text) {
  return (await (await call("tokenize", { prompt: text })).json()).count;
}

/** The events of a streamed answer. Throws ApiError if it ends without its last word. */
export async function* stream(path, body, signal) {
  const response = await call(path, { ...body, stream: true }, signal);
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  for (;;) {
    const { done, value } = await reached(reader.read());
    if (done) throw new ApiError(0, "The answer broke off.");
    const events = (rest + value).split(/\r?\n\r?\n/);
    rest = events.pop();
    for (const event of events) {
      const lines = event.split(/\r?\n/).filter((line) => line.startsWith("data:"));
      if (!lines.length) continue; // a comment that keeps the connection open
      const data = lines.map((line) => line.slice(5).trim()).join("\n");
      if (data === "[DONE]") return;
      const chunk = JSON.parse(data);
      if (chunk.error) throw new ApiError(response.status, chunk.error.message, chunk.error);
      yield chunk;
    }
  }
}

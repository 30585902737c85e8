// The server's interface, as this page needs it.

export class ApiError extends Error {
  constructor(status, message, retryAfter, code = null) {
    super(message);
    this.status = status;
    this.code = code;
    this.retryAfter = retryAfter;
  }
}

async function call(path, key, options = {}) {
  const headers = { ...(options.body && { "Content-Type": "application/json" }), ...(key && { Authorization: `Bearer ${key}` }) };
  const response = await fetch(path, { ...options, headers });
  if (response.ok) return response;
  const body = await response.json().catch(() => null);
  throw new ApiError(response.status, body?.error?.message ?? response.statusText, response.headers.get("Retry-After") ?? "?", body?.error?.code);
}

export async function listModels(key) {
  return (await (await call("v1/models", key)).json()).data;
}

export async function attention(request, key) {
  return (await call("api/attention", key, { method: "POST", body: JSON.stringify(request) })).json();
}

// The chunks of an answer, as they come.
export async function* ask(request, key, signal) {
  const body = JSON.stringify({ ...request, stream: true, stream_options: { include_usage: true } });
  const response = await call("v1/chat/completions", key, { method: "POST", body, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let waiting = "";
  for (;;) {
    const { done, value } = await reader.read();
    if (done) return;
    const events = (waiting + value).split("\n\n");
    waiting = events.pop();
    for (const event of events) {
      if (!event.startsWith("data: ") || event === "data: [DONE]") continue;
      const chunk = JSON.parse(event.slice(6));
      if (chunk.error) throw new ApiError(500, chunk.error.message, "?");
      yield chunk;
    }
  }
}

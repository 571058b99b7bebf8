/**
 * A stream of server-sent events over `fetch`, for servers that want a header and not a cookie.
 *
 * @module
 */
import type { EventStream, HeaderMap } from "./index.js";

export interface StreamOptions {
  /** Sent with the request. A function is called for each. */
  headers?: HeaderMap | (() => HeaderMap | Promise<HeaderMap>);
  credentials?: RequestCredentials;
  fetch?: typeof fetch;
}

const LONGEST = 64 * 1024; // line or event

/** Makes the `eventSource` of `createPermissions`. A stream that ends is an error, and it does not connect again by itself. */
export function fetchStream(options: StreamOptions = {}): (url: string) => EventStream {
  return (url) => {
    const abort = new AbortController();
    const target = new EventTarget();
    const stream: EventStream = {
      onopen: null,
      onerror: null,
      addEventListener: (type, listener) => target.addEventListener(type, listener as EventListener),
      close: () => abort.abort(),
    };
    void read().catch(() => {
      if (!abort.signal.aborted) stream.onerror?.(new Event("error"));
    });
    return stream;

    async function read() {
      const { headers, credentials = "same-origin" } = options;
      const own = typeof headers === "function" ? await headers() : headers;
      const response = await (options.fetch ?? fetch)(url, {
        headers: { accept: "text/event-stream", ...own },
        credentials,
        cache: "no-store",
        signal: abort.signal,
      });
      const type = response.headers.get("content-type") ?? "";
      if (!response.ok || !response.body || !/^text\/event-stream\b/i.test(type))
        throw new Error("not a stream");
      stream.onopen?.(new Event("open"));
      let name = "";
      let data: string[] = [];
      let id = "";
      const dispatch = () => {
        if (data.length) {
          const event = new MessageEvent(name || "message", { data: data.join("\n"), lastEventId: id });
          target.dispatchEvent(event);
        }
        name = "";
        data = [];
      };
      const line = (text: string) => {
        if (text === "") return dispatch();
        const [, field, value = ""] = /^([^:]*):? ?(.*)$/.exec(text) ?? [];
        if (field === "event") name = value;
        else if (field === "data") data.push(value);
        else if (field === "id") id = value;
      };
      const decoder = new TextDecoder();
      const reader = response.body.getReader();
      let rest = "";
      for (;;) {
        const { done, value } = await reader.read();
        if (done) throw new Error("the stream has ended");
        rest += decoder.decode(value, { stream: true });
        // A CR at the end may be half of a CRLF.
        const lines = rest.split(/\r\n|\n|\r(?!$)/);
        rest = lines.pop() ?? "";
        for (const text of lines) line(text);
        if (rest.length + data.length > LONGEST) throw new Error("an event is too long");
        if (abort.signal.aborted) return;
      }
    }
  };
}

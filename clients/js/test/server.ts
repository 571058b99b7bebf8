import { createServer, type IncomingMessage, type ServerResponse } from "node:http";
import type { AddressInfo } from "node:net";

/** A small server that speaks as Gatehouse does, for one user. */
export interface Server {
  url: string;
  permissions: Record<string, string[]>;
  subject: { type: string; id: string };
  version: number;
  /** What is answered instead of a list, where it is not 200. */
  status: number;
  /** Added to the answer with a list. */
  headers: Record<string, string>;
  /** Whether a stream begins with the version. */
  greets: boolean;
  /** "type/id/action" of single resources that are allowed. */
  instances: Set<string>;
  requests: {
    method: string;
    path: string;
    status: number;
    headers: IncomingMessage["headers"];
    body: string;
  }[];
  streams: Set<ServerResponse>;
  /** Changes the list and tells all streams. */
  change(permissions: Record<string, string[]>): void;
  count(what: string): number;
  [Symbol.asyncDispose](): Promise<void>;
}

export async function startServer(permissions: Record<string, string[]>): Promise<Server> {
  const server = createServer(async (request, response) => {
    let body = "";
    for await (const chunk of request.setEncoding("utf8")) body += chunk;
    const path = new URL(request.url ?? "", self.url).pathname.replace("/t/orders/v1", "");
    answer(path, request, response, body);
    self.requests.push({
      method: request.method ?? "",
      path,
      status: response.statusCode,
      headers: request.headers,
      body,
    });
  });
  const event = () => `event: permissions\nid: v${self.version}\ndata: {"version":"v${self.version}"}\n\n`;
  const answer = (path: string, request: IncomingMessage, response: ServerResponse, body: string) => {
    if (self.status !== 200) return response.writeHead(self.status, self.headers).end("{}");
    const etag = `"e${self.version}"`;
    switch (path) {
      case "/me/permissions":
        response.setHeader("etag", etag).setHeader("cache-control", "private, no-cache");
        for (const [name, value] of Object.entries(self.headers)) response.setHeader(name, value);
        if (request.headers["if-none-match"] === etag) return response.writeHead(304).end();
        return response.setHeader("content-type", "application/json").end(
          JSON.stringify({
            version: `v${self.version}`,
            tenant: "orders",
            subject: self.subject,
            revision: "r1",
            incomplete: false,
            permissions: self.permissions,
          }),
        );
      case "/me/permissions/events":
        response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-store" });
        response.write(`: hello\n\n${self.greets ? event() : ""}`);
        self.streams.add(response);
        return response.on("close", () => self.streams.delete(response));
      case "/me/permissions/check": {
        const { items } = JSON.parse(body);
        const results = items.map((i: { action: string; resource: { type: string; id: string } }) =>
          self.instances.has(`${i.resource.type}/${i.resource.id}/${i.action}`),
        );
        return response.setHeader("content-type", "application/json").end(JSON.stringify({ results }));
      }
    }
    return response.writeHead(404).end();
  };
  await new Promise<void>((resolve) => server.listen(0, "127.0.0.1", resolve));
  const self: Server = {
    url: `http://127.0.0.1:${(server.address() as AddressInfo).port}/t/orders/v1/me/permissions`,
    permissions,
    subject: { type: "user", id: "alice" },
    version: 1,
    status: 200,
    headers: {},
    greets: true,
    instances: new Set(),
    requests: [],
    streams: new Set(),
    change(changed) {
      self.permissions = changed;
      self.version++;
      for (const stream of self.streams) stream.write(event());
    },
    count: (what) => self.requests.filter((r) => `${r.method} ${r.path} ${r.status}`.startsWith(what)).length,
    async [Symbol.asyncDispose]() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
    },
  };
  return self;
}

/** Waits until it is so. */
export async function until(so: () => boolean, what: string): Promise<void> {
  const end = Date.now() + 5_000;
  while (!so()) {
    if (Date.now() > end) throw new Error(`waited in vain: ${what}`);
    await new Promise((resolve) => setTimeout(resolve, 5));
  }
}

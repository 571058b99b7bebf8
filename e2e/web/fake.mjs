// The server of the order desk (deploy/demo/web/README.md), and a small Gatehouse
// and Envoy in its place where there is none: it answers for /t/ and enforces the
// roles of the tenants' data by itself.
//
//   node fake.mjs [PORT]     a desk to look at, on http://localhost:10080
import { createHash, createHmac, timingSafeEqual } from "node:crypto";
import { cp, mkdtemp, readFile, rename, rm, writeFile } from "node:fs/promises";
import { createServer } from "node:http";
import { tmpdir } from "node:os";
import { join } from "node:path";
import { fileURLToPath } from "node:url";

const root = fileURLToPath(new URL("../..", import.meta.url));
const cookieName = "__Host-session";
const users = ["alice", "bob", "carol"];
const teams = ["orders", "storefront"];

const files = {
  "/": ["deploy/demo/web/public/index.html", "text/html; charset=utf-8"],
  "/desk.css": ["deploy/demo/web/public/desk.css", "text/css; charset=utf-8"],
  "/desk.js": ["deploy/demo/web/public/desk.js", "text/javascript; charset=utf-8"],
  "/icon.svg": ["deploy/demo/web/public/icon.svg", "image/svg+xml"],
  "/permissions.js": ["clients/js/dist/index.js", "text/javascript; charset=utf-8"],
};
const policy =
  "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; " +
  "base-uri 'none'; form-action 'self'; frame-ancestors 'none'";

// What the catalogues of the tenants' permissions.rego say.
const catalog = {
  orders: {
    order: {
      list: ["GET", "/orders"],
      create: ["POST", "/orders"],
      cancel: ["DELETE", "/orders/0"],
      refund: ["POST", "/orders/0/refund"],
      ship: ["POST", "/orders/0/ship"],
    },
  },
  storefront: {
    product: {
      list: ["GET", "/storefront/products"],
      price: ["PUT", "/storefront/products/0"],
      publish: ["POST", "/storefront/products/0/publish"],
    },
  },
};

/** Starts a desk. `tenants` is the folder that a change changes; a copy where none is given. */
export async function startDesk({ port = 0, lists = true, enforces = true, tenants, delay = 0 } = {}) {
  const own = tenants ? null : await mkdtemp(join(tmpdir(), "order-desk-"));
  const dir = tenants ?? own;
  if (own) for (const team of teams) await cp(join(root, "deploy/demo", team), join(own, team), { recursive: true });
  const data = Object.fromEntries(
    await Promise.all(
      teams.map(async (team) => [team, JSON.parse(await readFile(join(dir, team, "data.json"), "utf8"))]),
    ),
  );
  const secret = data.orders.secret;
  const streams = new Set(); // of events
  const counts = { lists: 0, unchanged: 0, streams: 0, checks: 0 };

  const orders = [
    ["1001", "Mensah & Sons", 129.9, "open"],
    ["1002", "Café Lumière", 58.4, "shipped"],
    ["1003", "Ode Okafor", 412, "open"],
    ["1004", "Haus am See", 76.25, "open"],
    ["1005", "Ines Duarte", 23.5, "cancelled"],
  ].map(([id, customer, total, status]) => ({ id, customer, total, status }));
  const products = [
    ["lamp", "Reading lamp", 49.9, true],
    ["chair", "Oak chair", 129, true],
    ["vase", "Blue vase", 18.5, false],
  ].map(([id, title, price, published]) => ({ id, title, price, published }));

  const encode = (value) => Buffer.from(JSON.stringify(value)).toString("base64url");
  const mac = (text) => createHmac("sha256", secret).update(text).digest("base64url");
  const sign = (user, exp) => {
    const text = `${encode({ alg: "HS256", typ: "JWT" })}.${encode({ iss: "order-desk", aud: teams, sub: user, exp })}`;
    return `${text}.${mac(text)}`;
  };
  const sessionOf = (request) => {
    const cookie = (request.headers.cookie ?? "").split(/; */).find((c) => c.startsWith(`${cookieName}=`));
    const [head, body, sum] = cookie?.slice(cookieName.length + 1).split(".") ?? [];
    if (!sum) return null;
    const want = Buffer.from(mac(`${head}.${body}`));
    const got = Buffer.from(sum);
    if (want.length !== got.length || !timingSafeEqual(want, got)) return null;
    const claims = JSON.parse(Buffer.from(body, "base64url"));
    return claims.exp * 1000 > Date.now() ? claims : null;
  };

  // ---- In place of the policies.
  const may = (team, user, method, path) => {
    if (team === "storefront")
      return ["GET", "HEAD"].includes(method) || !!data.storefront.users[user]?.roles.includes("merchandiser");
    const held = Object.keys(data.orders.holds).some((id) => path === `/orders/${id}/ship`);
    const fits = (glob) => new RegExp(`^${glob.replaceAll("*", "[^/]*")}$`).test(path);
    const roles = data.orders.users[user]?.roles ?? [];
    const grants = roles.flatMap((role) => data.orders.grants[role] ?? []);
    return !held && grants.some((grant) => grant.method === method && fits(grant.path));
  };
  const listOf = (team, user) => {
    const permissions = {};
    for (const [type, actions] of Object.entries(catalog[team])) {
      const allowed = Object.keys(actions).filter((action) => may(team, user, ...actions[action]));
      if (allowed.length) permissions[type] = allowed.sort();
    }
    const version = createHash("sha256").update(JSON.stringify([team, user, permissions])).digest("hex").slice(0, 16);
    return { version, tenant: team, subject: { type: "user", id: user }, revision: "", incomplete: false, permissions };
  };
  const tell = (stream) => {
    const { version } = listOf(stream.team, stream.user);
    if (version === stream.version) return;
    stream.version = version;
    stream.response.write(`event: permissions\nid: ${version}\ndata: ${JSON.stringify({ version })}\n\n`);
  };

  const json = (response, status, value, headers = {}) => {
    response.writeHead(status, { "content-type": "application/json", "cache-control": "no-store", ...headers });
    response.end(value === undefined ? "" : `${JSON.stringify(value)}\n`);
  };

  const gatehouse = (team, rest, request, response, body) => {
    const session = sessionOf(request);
    if (!catalog[team]) return json(response, 404, { error: "not found" });
    if (!session) return json(response, 401, { error: "no credential" }, { "www-authenticate": "Bearer" });
    const { sub: user, exp } = session;
    if (rest === "/v1/me/permissions" && request.method === "GET") {
      const text = JSON.stringify(listOf(team, user));
      const etag = `"${createHash("sha256").update(text).digest("hex")}"`;
      const headers = {
        etag,
        "cache-control": "private, no-cache",
        expires: new Date(exp * 1000).toUTCString(),
        vary: "Authorization, Cookie, Origin",
        "content-type": "application/json",
      };
      counts.lists++;
      if (request.headers["if-none-match"] === etag) {
        counts.unchanged++;
        return response.writeHead(304, headers).end();
      }
      return response.writeHead(200, headers).end(text);
    }
    if (rest === "/v1/me/permissions/events" && request.method === "GET") {
      response.writeHead(200, { "content-type": "text/event-stream", "cache-control": "no-store" });
      const stream = { team, user, response, version: "" };
      streams.add(stream);
      counts.streams++;
      tell(stream);
      const heartbeat = setInterval(() => response.write(": still here\n\n"), 20_000);
      response.on("close", () => {
        clearInterval(heartbeat);
        streams.delete(stream);
      });
      return;
    }
    if (rest === "/v1/me/permissions/check" && request.method === "POST") {
      counts.checks++;
      const results = body.items.map(({ action, resource: { type, id } }) => {
        const asked = catalog[team][type]?.[action];
        return !!asked && may(team, user, asked[0], asked[1].replace(/\/0(?=\/|$)/, () => `/${id}`));
      });
      return json(response, 200, { results });
    }
    return json(response, 404, { error: "not found" });
  };

  // ---- The page's own server.
  const change = async (team, user, role, granted) => {
    const file = join(dir, team, "data.json");
    const text = JSON.parse(await readFile(file, "utf8"));
    const roles = text.users[user].roles.filter((r) => r !== role);
    text.users[user].roles = granted ? [...roles, role] : roles;
    await writeFile(join(dir, `.${team}.json`), `${JSON.stringify(text, null, 2)}\n`);
    await rename(join(dir, `.${team}.json`), file);
    data[team] = text;
    setTimeout(() => streams.forEach(tell), delay).unref();
  };

  const route = async (request, response, path, body) => {
    const { method } = request;
    const at = (verb, pattern) => method === verb && pattern.exec(path);
    let m;
    if (method === "GET" && files[path]) {
      const [file, type] = files[path];
      response.writeHead(200, {
        "content-type": type,
        "cache-control": "no-cache",
        "content-security-policy": policy,
        "x-content-type-options": "nosniff",
        "referrer-policy": "no-referrer",
        "cross-origin-opener-policy": "same-origin",
      });
      return response.end(await readFile(join(root, file)));
    }
    if (path === "/session" && method === "GET") {
      const session = sessionOf(request);
      return json(response, 200, { user: session?.sub ?? null, expires: session?.exp ?? 0 });
    }
    if (path === "/session" && method === "POST") {
      if (!users.includes(body?.user)) return json(response, 400, { error: "user is not one of the demo's" });
      const expires = Math.floor(Date.now() / 1000) + 900;
      return json(response, 200, { user: body.user, expires }, {
        "set-cookie": `${cookieName}=${sign(body.user, expires)}; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=900`,
      });
    }
    if (path === "/session" && method === "DELETE")
      return json(response, 204, undefined, {
        "set-cookie": `${cookieName}=; Path=/; Secure; HttpOnly; SameSite=Lax; Max-Age=0`,
      });
    if (at("GET", /^\/stage\/roles$/))
      return json(response, 200, Object.fromEntries(
        teams.map((team) => [
          team,
          Object.fromEntries(Object.entries(data[team].users).map(([user, { roles }]) => [user, roles])),
        ]),
      ));
    if ((m = at("PUT", /^\/stage\/roles\/(\w+)\/(\w+)\/(\w+)$/))) {
      const [, team, user, role] = m;
      if (!data[team]?.users[user] || typeof body?.granted !== "boolean") return json(response, 400, { error: "no such role" });
      await change(team, user, role, body.granted);
      return json(response, 204);
    }

    const team = path.split("/")[1];
    if (!teams.includes(team)) return json(response, 404, { error: "not found" });
    if (enforces && !may(team, sessionOf(request)?.sub, method, path))
      return json(response, team === "orders" ? 403 : 405, { error: `${team}: your roles do not cover this` });
    if (at("GET", /^\/orders$/)) return json(response, 200, { orders });
    if (at("POST", /^\/orders$/)) {
      const { customer, total } = body ?? {};
      if (typeof customer !== "string" || !(total > 0)) return json(response, 400, { error: "customer and total are needed" });
      const order = { id: String(1001 + orders.length), customer, total, status: "open" };
      orders.push(order);
      return json(response, 201, order);
    }
    const turn = (m, from, to) => {
      const order = orders.find(({ id }) => id === m[1]);
      if (!order) return json(response, 404, { error: "there is no such order" });
      if (order.status !== from) return json(response, 409, { error: `the order is ${order.status}` });
      order.status = to;
      return json(response, 200, order);
    };
    if ((m = at("POST", /^\/orders\/(\d+)\/ship$/))) return turn(m, "open", "shipped");
    if ((m = at("POST", /^\/orders\/(\d+)\/refund$/))) return turn(m, "shipped", "refunded");
    if ((m = at("DELETE", /^\/orders\/(\d+)$/))) return turn(m, "open", "cancelled");
    if (at("GET", /^\/storefront\/products$/)) return json(response, 200, { products });
    const product = products.find(({ id }) => id === path.split("/")[3]);
    if (product && at("PUT", /^\/storefront\/products\/\w+$/) && body?.price > 0) {
      product.price = body.price;
      return json(response, 200, product);
    }
    if (product && at("POST", /^\/storefront\/products\/\w+\/publish$/)) {
      product.published = !product.published;
      return json(response, 200, product);
    }
    return json(response, 404, { error: "not found" });
  };

  const server = createServer(async (request, response) => {
    try {
      let text = "";
      for await (const chunk of request.setEncoding("utf8")) if ((text += chunk).length > 65536) return request.destroy();
      const body = text ? JSON.parse(text) : null;
      const { pathname } = new URL(request.url, "http://desk");
      const [, team, rest] = /^\/t\/([^/]+)(\/.*)$/.exec(pathname) ?? [];
      if (team && lists) gatehouse(team, rest, request, response, body);
      else await route(request, response, pathname, body);
    } catch {
      if (!response.headersSent) json(response, 400, { error: "the request cannot be read" });
    }
  });
  await new Promise((resolve, reject) => server.on("error", reject).listen(port, "127.0.0.1", resolve));
  return {
    url: `http://localhost:${server.address().port}`,
    counts,
    streams,
    async close() {
      server.closeAllConnections();
      await new Promise((resolve) => server.close(resolve));
      if (own) await rm(own, { recursive: true });
    },
  };
}

if (process.argv[1] === fileURLToPath(import.meta.url)) {
  const { url } = await startDesk({ port: Number(process.argv[2] ?? 10080), delay: 500 });
  process.stdout.write(`The order desk is at ${url}. Interrupt to end.\n`);
}

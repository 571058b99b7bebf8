// The order desk. What it shows follows from two permission lists, one of each
// team, and nothing here decides about a request: that is done where it arrives.
import { createPermissions } from "/permissions.js";

const teams = {
  orders: { type: "order", actions: ["list", "create", "ship", "cancel", "refund"], role: ["bob", "manager"] },
  storefront: { type: "product", actions: ["list", "price", "publish"], role: ["carol", "merchandiser"] },
};
const words = {
  order: { list: "see orders", create: "create orders", ship: "ship orders", cancel: "cancel orders", refund: "refund orders" },
  product: { list: "see products", price: "set prices", publish: "show and hide products" },
};
// The request that each action stands for, to try what is not allowed.
const requests = {
  "order list": ["GET", "/orders"],
  "order create": ["POST", "/orders", { customer: "Nobody", total: 1 }],
  "order ship": ["POST", "/orders/1001/ship"],
  "order cancel": ["DELETE", "/orders/1001"],
  "order refund": ["POST", "/orders/1001/refund"],
  "product list": ["GET", "/storefront/products"],
  "product price": ["PUT", "/storefront/products/lamp", { price: 1 }],
  "product publish": ["POST", "/storefront/products/lamp/publish"],
};

const $ = (id) => document.getElementById(id);
const money = new Intl.NumberFormat("en", { style: "currency", currency: "EUR" });
const name = (user) => user[0].toUpperCase() + user.slice(1);

/** Makes an element: properties, then children. */
function make(tag, properties = {}, ...children) {
  const { data, aria, ...rest } = properties;
  const element = Object.assign(document.createElement(tag), rest);
  Object.assign(element.dataset, data);
  for (const [key, value] of Object.entries(aria ?? {})) element.setAttribute(`aria-${key}`, value);
  element.append(...children);
  return element;
}

/** Sends a request, and gives its status and what it says. */
async function send(method, path, body) {
  const response = await fetch(path, {
    method,
    headers: { accept: "application/json", ...(body && { "content-type": "application/json" }) },
    body: body && JSON.stringify(body),
  });
  const text = await response.text();
  let value = null;
  try {
    value = JSON.parse(text);
  } catch {}
  return { ok: response.ok, status: response.status, text: text.trim(), value };
}

let quiet;
function say(text) {
  clearTimeout(quiet);
  $("news").replaceChildren(make("p", {}, text));
  quiet = setTimeout(() => $("news").replaceChildren(), 8000);
}

// ---- The user, and what it may do.

let user = null;
let may = {}; // :: team → its permissions
let seen = {}; // :: team → what its list allowed when it was last shown
let renewal;

async function login(next) {
  const { ok, value } = await send(...(next ? ["POST", "/session", { user: next }] : ["DELETE", "/session"]));
  if (ok) become(next ? value : { user: null });
  else say("The login did not work.");
}

function become(session) {
  for (const permissions of Object.values(may)) permissions.close();
  may = {};
  seen = {};
  shown.clear();
  rows.orders = rows.products = null;
  user = session.user;
  clearTimeout(renewal);
  document.body.dataset.user = user ?? "";
  $("welcome").hidden = !!user;
  for (const id of ["orders", "storefront", "aside", "logout"]) $(id).hidden = !user;
  for (const radio of document.querySelectorAll("#who input")) radio.checked = radio.value === user;
  // What another user saw is gone before anything is asked.
  $("create").hidden = true;
  for (const table of ["orders-table", "products-table"]) $(table).tBodies[0].replaceChildren();
  if (!user) return;
  for (const team of Object.keys(teams)) {
    const permissions = createPermissions({ url: `/t/${team}/v1/me/permissions` });
    may[team] = permissions;
    permissions.subscribe(() => may[team] === permissions && show(team));
  }
  for (const team of Object.keys(teams)) show(team);
  renew(session);
  void stage();
}

/** Renews the session well before it ends. */
function renew(session) {
  renewal = setTimeout(
    async () => {
      const { ok, value } = await send("POST", "/session", { user });
      if (ok) renew(value);
    },
    Math.max(1000, (session.expires * 1000 - Date.now()) * 0.6),
  );
}

const can = (team, action, id) => {
  const { type } = teams[team];
  return may[team]?.can(action, id === undefined ? type : { type, id }) ?? false;
};

/** Shows all that follows from the list of a team. */
function show(team) {
  const { type, actions } = teams[team];
  const { status } = may[team].state;
  $(team).setAttribute("aria-busy", String(status === "loading"));
  if (status === "loading") return lists();
  const now = actions.filter((action) => can(team, action));
  const before = seen[team];
  seen[team] = now;
  keepingFocus(() => {
    if (team === "orders") orders();
    else products();
    lists();
  });
  if (!before) return;
  const won = now.filter((action) => !before.includes(action)).map((action) => words[type][action]);
  const lost = before.filter((action) => !now.includes(action)).map((action) => words[type][action]);
  if (won.length) say(`You may now ${won.join(" and ")}.`);
  if (lost.length) say(`You may no longer ${lost.join(" or ")}.`);
}

/** What is drawn anew keeps the focus, or gives it to the heading above, and not to nothing. */
function keepingFocus(draw) {
  const { activeElement } = document;
  const section = activeElement?.closest?.("section");
  draw();
  if (!activeElement || activeElement === document.body || !activeElement.id) return;
  const there = $(activeElement.id);
  if (there?.checkVisibility()) return there.focus();
  const heading = section?.querySelector("h1, h2");
  if (!heading) return;
  heading.tabIndex = -1;
  heading.focus();
}

// ---- The tables.

const shown = new Set(); // IDs of the buttons that were there before
const rows = { orders: null, products: null };

/** A button for an action, or nothing where it is not allowed. */
function button(allowed, id, label, about, act, kind = "") {
  if (!allowed) {
    shown.delete(id);
    return "";
  }
  const fresh = !shown.has(id);
  shown.add(id);
  const element = make("button", { id, type: "button", className: `${kind} ${fresh ? "new" : ""}`.trim() }, label);
  element.append(make("span", { className: "unseen" }, ` ${about}`));
  element.addEventListener("click", act);
  return element;
}

/** Carries out an action, and says what came of it. */
async function act(done, again, ...request) {
  const answer = await send(...request);
  say(answer.ok ? done : refused(answer));
  if (answer.ok) await again();
}
const refused = ({ status, value, text }) =>
  `Refused with ${status}: ${value?.error ?? (text || "no reason was given")}`;

async function fetchRows(which, team, path, draw) {
  if (!can(team, "list")) rows[which] = null;
  else {
    const asked = may[team];
    const { ok, value } = await send("GET", path);
    if (asked !== may[team]) return;
    rows[which] = ok ? value[which] : null;
    if (which === "orders" && rows.orders)
      void asked.check(
        rows.orders.map(({ id }) => ({ action: "ship", resource: { type: "order", id } })),
      );
  }
  keepingFocus(draw);
}

const fetchOrders = () => fetchRows("orders", "orders", "/orders", drawOrders);
const fetchProducts = () => fetchRows("products", "storefront", "/storefront/products", drawProducts);

/** Asks for the rows where they are missing or must go, and draws what there is. */
function orders() {
  if (can("orders", "list") !== !!rows.orders) void fetchOrders();
  drawOrders();
}
function products() {
  if (can("storefront", "list") !== !!rows.products) void fetchProducts();
  drawProducts();
}

function drawOrders() {
  const there = can("orders", "list") && !!rows.orders;
  $("create").hidden = !can("orders", "create");
  $("orders-none").hidden = can("orders", "list");
  $("orders-table").parentElement.hidden = !there;
  const body = $("orders-table").tBodies[0];
  if (!there) return body.replaceChildren();
  body.replaceChildren(
    ...rows.orders.map(({ id, customer, total, status }) => {
      const open = status === "open";
      const about = `order ${id}`;
      return make(
        "tr",
        { id: `order-${id}` },
        make("th", { scope: "row" }, id),
        make("td", {}, customer),
        make("td", { className: "number" }, money.format(total)),
        make("td", {}, make("span", { className: "badge", data: { status } }, status)),
        make(
          "td",
          { className: "actions" },
          button(open && can("orders", "ship", id), `ship-${id}`, "Ship", about, () =>
            act(`Order ${id} is on its way.`, fetchOrders, "POST", `/orders/${id}/ship`),
          ),
          button(status === "shipped" && can("orders", "refund"), `refund-${id}`, "Refund", about, () =>
            act(`Order ${id} is refunded.`, fetchOrders, "POST", `/orders/${id}/refund`),
          ),
          button(
            open && can("orders", "cancel"),
            `cancel-${id}`,
            "Cancel",
            about,
            () => act(`Order ${id} is cancelled.`, fetchOrders, "DELETE", `/orders/${id}`),
            "danger",
          ),
        ),
      );
    }),
  );
}

function drawProducts() {
  const there = can("storefront", "list") && !!rows.products;
  $("products-none").hidden = can("storefront", "list");
  $("products-table").parentElement.hidden = !there;
  const body = $("products-table").tBodies[0];
  if (!there) return body.replaceChildren();
  body.replaceChildren(
    ...rows.products.map(({ id, title, price, published }) => {
      const status = published ? "shown" : "hidden";
      const next = Math.round(price * 110) / 100;
      return make(
        "tr",
        { id: `product-${id}` },
        make("th", { scope: "row" }, title),
        make("td", { className: "number" }, money.format(price)),
        make("td", {}, make("span", { className: "badge", data: { status } }, status)),
        make(
          "td",
          { className: "actions" },
          button(can("storefront", "price"), `price-${id}`, "Price +10 %", `for ${title}`, () =>
            act(`${title} costs ${money.format(next)} now.`, fetchProducts, "PUT", `/storefront/products/${id}`, {
              price: next,
            }),
          ),
          button(can("storefront", "publish"), `publish-${id}`, published ? "Hide" : "Show", title, () =>
            act(`${title} is ${published ? "hidden" : "shown"}.`, fetchProducts, "POST", `/storefront/products/${id}/publish`),
          ),
        ),
      );
    }),
  );
}

// ---- New orders.

$("create").addEventListener("click", () => $("create-dialog").showModal());
$("create-cancel").addEventListener("click", () => $("create-dialog").close());
$("create-form").addEventListener("submit", () => {
  const { customer, total } = Object.fromEntries(new FormData($("create-form")));
  $("create-form").reset();
  void act(`The order of ${customer} is created.`, fetchOrders, "POST", "/orders", { customer, total: Number(total) });
});

// ---- Behind the scenes.

function lists() {
  $("lists").replaceChildren(
    ...Object.entries(teams).map(([team, { type, actions }]) => {
      const { status, list } = may[team].state;
      const version = list ? ` · version ${String(list.version).slice(0, 8)}` : "";
      return make(
        "div",
        { className: "list", id: `list-${team}`, data: { status, version: list?.version ?? "" } },
        make("header", {}, make("h3", {}, name(team)), make("span", { className: "state" }, status + version)),
        make(
          "ul",
          {},
          ...actions.map((action) => {
            const allowed = can(team, action);
            const what = words[type][action];
            const item = make(
              "li",
              { id: `may-${type}-${action}`, className: allowed ? "yes" : "no", data: { allowed } },
              make("span", { aria: { hidden: "true" } }, allowed ? "✓" : "–"),
              make("span", {}, what[0].toUpperCase() + what.slice(1)),
              make("span", { className: "unseen" }, allowed ? ": allowed" : ": not allowed"),
            );
            if (!allowed && status !== "loading") {
              const again = make("button", { type: "button", id: `try-${type}-${action}` }, "Try");
              again.append(make("span", { className: "unseen" }, ` to ${what}`));
              again.addEventListener("click", async () => {
                const answer = await send(...requests[`${type} ${action}`]);
                say(answer.ok ? `It was allowed (${answer.status}).` : refused(answer));
              });
              item.append(again);
            }
            return item;
          }),
        ),
      );
    }),
  );
}

/** Shows who has which role, and lets a visitor change two of them. */
async function stage() {
  const { ok, value } = await send("GET", "/stage/roles");
  if (!ok) return $("stage").replaceChildren(make("p", { className: "hint" }, "This desk has no stage."));
  keepingFocus(() =>
    $("stage").replaceChildren(
      ...Object.entries(teams).map(([team, { role }]) => {
        const [who, what] = role;
        const input = make("input", {
          type: "checkbox",
          id: `stage-${team}`,
          checked: value[team]?.[who]?.includes(what) ?? false,
        });
        input.addEventListener("change", async () => {
          const answer = await send("PUT", `/stage/roles/${team}/${who}/${what}`, { granted: input.checked });
          if (!answer.ok) say(refused(answer));
          await stage();
        });
        return make(
          "fieldset",
          {},
          make("legend", {}, name(team)),
          make("label", {}, input, `${name(who)} is a ${what}`),
        );
      }),
    ),
  );
}

// ---- Begin.

for (const radio of document.querySelectorAll("#who input"))
  radio.addEventListener("change", () => login(radio.value));
$("logout").addEventListener("click", async () => {
  await login(null);
  $("main").focus();
});
// Another page may have changed who is logged in.
document.addEventListener("visibilitychange", async () => {
  if (document.hidden) return;
  const { ok, value } = await send("GET", "/session");
  if (ok && value.user !== user) become(value);
});

const { ok, value } = await send("GET", "/session");
become(ok ? value : { user: null });

// A browser at the order desk: at the real one, behind a real Envoy and a real
// Gatehouse, where GATEHOUSE_DEMO names the binary of the demo; with DESK_URL at
// the desk there, which must be as new; else at a fake one.
import assert from "node:assert/strict";
import { mkdir } from "node:fs/promises";
import { after, afterEach, before, beforeEach, test } from "node:test";
import { fileURLToPath } from "node:url";
import { chromium } from "playwright-core";
import { startDemo } from "./demo.mjs";
import { startDesk } from "./fake.mjs";

const SOON = 3_000; // an event brings a change within this time
const shots = fileURLToPath(new URL("screenshots/", import.meta.url));

let desk;
let browser;
let context;
let page;
let troubles; // what the console and the network complained about
let expected; // patterns of what they may complain about

before(async () => {
  await mkdir(shots, { recursive: true });
  const { DESK_URL, GATEHOUSE_DEMO } = process.env;
  if (DESK_URL) desk = { url: DESK_URL, close() {} };
  else desk = await (GATEHOUSE_DEMO ? startDemo(GATEHOUSE_DEMO) : startDesk({ delay: 300 }));
  browser = await chromium.launch({
    executablePath: process.env.CHROMIUM ?? "/usr/bin/chromium",
    args: process.getuid?.() === 0 ? ["--no-sandbox"] : [],
  });
});
after(async () => {
  await browser?.close();
  await desk?.close();
});
beforeEach(async () => {
  context = await browser.newContext({ viewport: { width: 1280, height: 860 }, locale: "en-GB" });
  context.setDefaultTimeout(10_000);
  troubles = [];
  expected = [];
  page = await visit();
});
afterEach(async () => {
  // The stage is as it was, for the next test and the next run.
  for (const [team, user, role] of [["orders", "bob", "manager"], ["storefront", "carol", "merchandiser"]])
    await context.request.put(`${desk.url}/stage/roles/${team}/${user}/${role}`, {
      data: { granted: team === "storefront" },
    });
  await context.close();
  assert.deepEqual(troubles.filter((t) => !expected.some((e) => e.test(t))), []);
});

async function visit() {
  const p = await context.newPage();
  p.on("console", (m) => ["error", "warning"].includes(m.type()) && troubles.push(`${m.text()} ${m.location().url}`));
  p.on("pageerror", (e) => troubles.push(String(e)));
  p.on("requestfailed", (r) => r.failure()?.errorText === "net::ERR_ABORTED" || troubles.push(`${r.url()} ${r.failure()?.errorText}`));
  await p.goto(desk.url);
  return p;
}
async function login(user, p = page) {
  await p.locator(`#user-${user}`).check({ force: true });
  await p.locator(`body[data-user=${user}]`).waitFor();
  await p.locator('#orders[aria-busy="false"]').waitFor();
  await p.locator('#storefront[aria-busy="false"]').waitFor();
}
const allowed = (type, action) => page.locator(`#may-${type}-${action}[data-allowed="true"]`);
const shown = (selector) => page.locator(selector).waitFor({ state: "visible", timeout: SOON });
const gone = (selector) => page.locator(selector).waitFor({ state: "hidden", timeout: SOON });
const grant = (team, user, role, granted) =>
  context.request.put(`${desk.url}/stage/roles/${team}/${user}/${role}`, { data: { granted } });

test("the first paint asks who is there, and shows nothing that needs a permission", async () => {
  await page.getByRole("heading", { name: "Who are you today?" }).waitFor();
  assert.equal(await page.locator("main button:visible").count(), 0);
  await page.screenshot({ path: `${shots}welcome.png` });
});

test("each user sees the buttons of the own list", async () => {
  await login("alice");
  for (const id of ["create", "cancel-1001", "ship-1001", "refund-1002"]) await shown(`#${id}`);
  assert.equal(await page.locator("#ship-1003").count(), 0, "order 1003 is on hold");
  assert.equal(await page.locator("#price-lamp").count(), 0);
  await page.screenshot({ path: `${shots}alice.png`, fullPage: true });

  await login("bob");
  await shown("#ship-1001");
  assert.equal(await page.locator("#cancel-1001").count(), 0);
  assert.equal(await page.locator("#refund-1002").count(), 0);

  await login("carol");
  await shown("#price-lamp");
  await shown("#order-1001");
  assert.equal(await page.locator("#create").isVisible(), false);
  assert.equal(await page.locator("#orders-table tbody button").count(), 0);
});

test("a change of the policy shows by itself, and what is revoked is gone", async () => {
  await login("bob");
  await shown("#ship-1001");
  await grant("orders", "bob", "manager", true);
  await shown("#cancel-1001");
  await page.getByRole("status").filter({ hasText: "You may now cancel orders and refund orders." }).waitFor();
  await page.locator("#cancel-1001").focus();
  await grant("orders", "bob", "manager", false);
  await gone("#cancel-1001");
  await page.getByRole("status").filter({ hasText: "You may no longer cancel orders or refund orders." }).waitFor();
  assert.equal(await page.evaluate(() => document.activeElement.id), "orders-title", "the focus is not lost");
});

test("two pages follow over one stream", async () => {
  await login("bob");
  const other = await visit();
  await other.locator("#ship-1001").waitFor();
  await grant("orders", "bob", "manager", true);
  for (const p of [page, other]) await p.locator("#cancel-1001").waitFor({ timeout: SOON });
  if (desk.streams) assert.equal(desk.streams.size, 2, "one of each team");
  await other.close();
  await grant("orders", "bob", "manager", false);
  await gone("#cancel-1001");
});

test("a list that has not changed is not sent again", async () => {
  await login("bob");
  const answers = await page.evaluate(async () => {
    const { createPermissions } = await import("/permissions.js");
    const seen = [];
    const permissions = createPermissions({
      url: "/t/orders/v1/me/permissions",
      fetch: async (...request) => {
        const response = await fetch(...request);
        seen.push(response.status);
        return response;
      },
    });
    await permissions.ready;
    await permissions.refresh();
    seen.push(permissions.state.status, permissions.can("ship", "order"));
    permissions.close();
    return seen;
  });
  assert.deepEqual(answers, [200, 304, "ready", true]);
});

test("what the page does not show is refused all the same", async () => {
  expected = [/status of 40[35]/];
  await login("bob");
  await page.locator("#try-order-cancel").click();
  await page.getByRole("status").filter({ hasText: "Refused with 403: orders: your roles do not cover this" }).waitFor();
  await page.locator("#try-product-price").click();
  await page.getByRole("status").filter({ hasText: "Refused with 405" }).waitFor();
  const status = await page.evaluate(async () => {
    const headers = { "x-user": "alice" };
    return (await fetch("/orders/1001", { method: "DELETE", headers, credentials: "omit" })).status;
  });
  assert.equal(status, 403);
});

test("what the page shows works", async () => {
  await login("alice");
  await page.locator("#create").click();
  await page.getByLabel("Customer").fill("Anna <b>Berg</b>");
  await page.getByLabel("Total in euros").fill("12.50");
  await page.locator("#create-submit").click();
  const row = page.getByRole("row").filter({ hasText: "Anna <b>Berg</b>" }).first();
  await row.getByRole("button", { name: /^Ship order/ }).click();
  await row.getByText("shipped").waitFor();
  await row.getByRole("button", { name: /^Refund order/ }).click();
  await row.getByText("refunded").waitFor();
  await login("carol");
  await page.getByRole("button", { name: "Show Blue vase" }).click();
  await page.getByRole("button", { name: "Hide Blue vase" }).click();
  await page.getByRole("button", { name: "Show Blue vase" }).waitFor();
});

test("it can be used with the keyboard alone", async () => {
  const focused = () => page.evaluate(() => document.activeElement.id || document.activeElement.className);
  const press = async (key, times = 1) => {
    for (let i = 0; i < times; i++) await page.keyboard.press(key);
  };
  await press("Tab");
  assert.equal(await focused(), "skip");
  await press("Tab");
  await press("Space"); // the first of three
  await page.locator("#create").waitFor();
  assert.equal(await focused(), "user-alice");
  await press("ArrowRight");
  await page.locator("body[data-user=bob]").waitFor();
  await press("ArrowLeft");
  await page.locator("body[data-user=alice]").waitFor();
  await page.locator("#create").waitFor();
  await press("Tab");
  assert.equal(await focused(), "logout");
  await press("Tab");
  assert.equal(await focused(), "create");
  await press("Enter");
  assert.equal(await focused(), "create-customer");
  await press("Escape");
  assert.equal(await focused(), "create");
  await page.locator("#cancel-1004").waitFor();
  const ring = await page.evaluate(() => getComputedStyle(document.activeElement).outlineStyle);
  assert.equal(ring, "solid");
});

test("a screen reader hears names, states and news", async () => {
  await login("bob");
  await shown("#ship-1001");
  const tree = await page.locator("body").ariaSnapshot();
  for (const want of [
    "banner:",
    'group "Logged in as":',
    'radio "Bob" [checked]',
    "main:",
    'heading "Orders" [level=1]',
    'columnheader "Actions"',
    'rowheader "1001"',
    'button "Ship order 1001"',
    'heading "Storefront" [level=2]',
    'complementary "Behind the scenes":',
    'button "Try to cancel orders"',
    'checkbox "Bob is a manager"',
    "status",
  ])
    assert.ok(tree.includes(want), `${want} is not in\n${tree}`);
  assert.match(tree, /Create orders\s*:? ?:? allowed/);
  const nameless = await page.evaluate(() =>
    [...document.querySelectorAll("button, input, a, table, dialog")]
      .filter((e) => !(e.textContent.trim() || e.labels?.length || e.getAttribute("aria-labelledby")))
      .map((e) => e.outerHTML),
  );
  assert.deepEqual(nameless, []);
});

test("text stands out from its ground, by day and by night", async () => {
  await login("alice");
  await shown("#cancel-1001");
  for (const colorScheme of ["light", "dark"]) {
    await page.emulateMedia({ colorScheme, reducedMotion: "reduce" });
    await page.screenshot({ path: `${shots}${colorScheme}.png`, fullPage: true });
    const weak = await page.evaluate(() => {
      const parse = (c) => (c.match(/[\d.]+/g) ?? []).map(Number);
      const light = (c) =>
        [0.2126, 0.7152, 0.0722].reduce((sum, f, i) => {
          const v = c[i] / 255;
          return sum + f * (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4);
        }, 0);
      const ground = (e) => {
        for (let at = e; at; at = at.parentElement) {
          const c = parse(getComputedStyle(at).backgroundColor);
          if (c.length === 3 || c[3] === 1) return c;
        }
        return [255, 255, 255];
      };
      return [...document.querySelectorAll("body *")]
        .filter((e) => e.checkVisibility() && [...e.childNodes].some((n) => n.nodeType === 3 && n.data.trim()))
        .map((e) => {
          const [a, b] = [light(parse(getComputedStyle(e).color)), light(ground(e))].sort((x, y) => y - x);
          return [(a + 0.05) / (b + 0.05), e.textContent.trim()];
        })
        .filter(([ratio]) => ratio < 4.5);
    });
    assert.deepEqual(weak, [], colorScheme);
    const moving = await page.evaluate(() => document.getAnimations().length);
    assert.equal(moving, 0, "nothing moves for those who do not want it");
  }
});

test("a small screen has no sideways scrolling", async () => {
  await page.setViewportSize({ width: 360, height: 740 });
  await login("alice");
  await shown("#create");
  const wide = await page.evaluate(() => document.documentElement.scrollWidth - innerWidth);
  assert.ok(wide <= 0, `${wide} pixels too wide`);
  await page.screenshot({ path: `${shots}small.png`, fullPage: true });
});

test("it loads nothing from elsewhere, and runs nothing that is inline", async () => {
  const response = await page.goto(desk.url);
  const csp = response.headers()["content-security-policy"] ?? "";
  assert.match(csp, /default-src 'none'/);
  assert.doesNotMatch(csp, /unsafe|\*/);
  const from = new Set();
  page.on("request", (r) => from.add(new URL(r.url()).origin));
  await login("bob");
  await shown("#ship-1001");
  assert.deepEqual([...from], [desk.url]);
  const [cookie] = await context.cookies();
  assert.deepEqual(
    [cookie.name, cookie.httpOnly, cookie.secure, cookie.sameSite, cookie.path],
    ["__Host-session", true, true, "Lax", "/"],
  );
});

test("after a log-out nothing is left", async () => {
  await login("alice");
  await shown("#cancel-1001");
  await page.locator("#logout").click();
  await page.getByRole("heading", { name: "Who are you today?" }).waitFor();
  assert.equal(await page.locator("main button:visible").count(), 0);
  if (desk.streams) assert.equal(desk.streams.size, 0);
});

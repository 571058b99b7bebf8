import assert from "node:assert/strict";
import { after, test } from "node:test";
import { createPermissions, type Permissions } from "@gatehouse-authz/permissions";
import { Can, PermissionsProvider, useCan, usePermissions } from "@gatehouse-authz/permissions/react";
import { Window } from "happy-dom";
import { act, createElement as h, StrictMode } from "react";
import { renderToString } from "react-dom/server";
import { startServer, until } from "./server.js";

const window = new Window();
Object.assign(globalThis, {
  window,
  document: window.document,
  navigator: window.navigator,
  IS_REACT_ACT_ENVIRONMENT: true,
});
const { createRoot, hydrateRoot } = await import("react-dom/client");
after(() => window.close());

const open = (url: string) => createPermissions({ url, eventSource: false });
type May = Permissions;

let renders = 0;
function Create() {
  renders++;
  return h("input", { disabled: !useCan("create", "order") });
}
function Status() {
  const { status, list, can } = usePermissions();
  return h("p", null, `${status} ${list?.subject.id ?? "nobody"} ${can("list", "order")}`);
}
function App({ may }: { may: May }) {
  return h(
    StrictMode,
    null,
    h(
      PermissionsProvider,
      { permissions: may },
      h(Create),
      h(Status),
      h(Can, { I: "cancel", a: "order", fallback: h("i", null, "no") }, h("em", null, "cancel")),
      // biome-ignore lint/correctness/noChildrenProp: a function is no child for createElement
      h(Can, { I: "list", a: "order", children: (allowed: boolean) => h("b", null, String(allowed)) }),
      ["1", "2"].map((id) =>
        h(Can, { key: id, I: "ship", a: { type: "order", id } }, h("em", null, `ship ${id}`)),
      ),
    ),
  );
}
const body = () => window.document.body as unknown as HTMLElement;

test("components show what the user may, and follow", async () => {
  await using server = await startServer({ order: ["create", "list"] });
  server.instances.add("order/2/ship");
  const may = open(server.url);
  const root = createRoot(body());
  await act(async () => root.render(h(App, { may })));
  await act(async () => {
    await may.ready;
    await until(() => may.can("ship", { type: "order", id: "2" }), "the answer about order 2");
  });
  assert.equal(body().innerHTML, "<input><p>ready alice true</p><i>no</i><b>true</b><em>ship 2</em>");
  assert.equal(JSON.parse(server.requests.find((r) => r.method === "POST")?.body ?? "").items.length, 2);

  renders = 0;
  server.change({ order: ["create", "list", "cancel"] });
  await act(() => may.refresh());
  assert.equal(renders, 0, "what does not change is not rendered again");
  assert.match(body().innerHTML, /<em>cancel<\/em>/);

  server.change({ order: [] });
  await act(() => may.refresh());
  assert.match(body().innerHTML, /<input disabled=""><p>ready alice false<\/p><i>no<\/i>/);
  await act(async () => may.close());
  assert.match(body().innerHTML, /<p>denied nobody false<\/p>/);
  assert.doesNotMatch(body().innerHTML, /ship/);
  await act(async () => root.unmount());
});

test("a page rendered on a server is taken over as it is", async () => {
  await using server = await startServer({ order: ["create", "list"] });
  const there = open(server.url);
  await there.ready;
  await there.check([{ action: "ship", resource: { type: "order", id: "1" } }]);
  const html = renderToString(h(App, { may: there }));
  assert.match(html, /<input\/?><p>ready alice true<\/p>/);

  const here = createPermissions({ url: server.url, eventSource: false, initial: there.dehydrate() });
  body().innerHTML = html;
  const errors: unknown[] = [];
  let root: { unmount(): void } | undefined;
  await act(async () => {
    root = hydrateRoot(body(), h(App, { may: here }), { onRecoverableError: (e) => errors.push(e) });
  });
  assert.deepEqual(errors, []);
  assert.match(body().innerHTML, /<input\/?><p>ready alice true<\/p>/);
  await act(async () => root?.unmount());
  there.close();
  here.close();
});

test("a hook without a provider says so", () => {
  assert.throws(() => renderToString(h(Create)), /PermissionsProvider/);
});

// OPA's own client for JavaScript, at the data and batch API of two tenants.
import assert from "node:assert/strict";
import { after, before, beforeEach, test } from "node:test";
import { OPAClient } from "@open-policy-agent/opa";
import { HTTPClient } from "@open-policy-agent/opa/lib/http.js";
import { OpaApiClient } from "@open-policy-agent/opa/sdk/sdk.js";
import { BatchServerError } from "@open-policy-agent/opa/sdk/models/errors";
import { startGatehouse } from "./gatehouse.mjs";

const policy = `package shop.prices

price := data.prices[input.size]

price := 1 if input.size == "disputed"

price := 2 if input.size == "disputed"

default open := false

open if input.day in {"monday", "tuesday"}

echo := input

greeting := "hello"
`;
const token = "a-token-of-the-tests-that-is-long-enough";

let gatehouse;
let client; // of the tenant "shop"
let statuses; // of its responses

const clientOf = (tenant, headers = { authorization: `Bearer ${token}` }) => {
  const httpClient = new HTTPClient().addHook("response", (response) => void statuses.push(response.status));
  return new OPAClient(`${gatehouse.url}/t/${tenant}`, { headers, sdk: { httpClient } });
};

const refused = (status) => (error) => {
  assert.ok(error instanceof Error);
  assert.equal(statuses.at(-1), status);
  return true;
};

before(async () => {
  const data = ["price", "open", "echo", "greeting"].map((rule) => `shop/prices/${rule}`);
  gatehouse = await startGatehouse({
    config: {
      opa: { plugins: { gatehouse_http: { data, batch: { items: 500 }, auth: { tokens: [{ subject: "tests", token }] } } } },
    },
    tenants: {
      shop: { "policy.rego": policy, "data.json": '{"prices": {"small": 10, "large": 20}}' },
      kiosk: { "policy.rego": policy, "data.json": '{"prices": {"small": 11}}' },
    },
  });
  statuses = [];
  client = clientOf("shop");
});
after(() => gatehouse?.close());
beforeEach(() => void statuses.splice(0));

test("one decision, with an input and without", async () => {
  assert.equal(await client.evaluate("shop/prices/price", { size: "small" }), 10);
  assert.equal(await client.evaluate("shop/prices/open", { day: "sunday" }), false);
  assert.equal(await client.evaluate("shop/prices/greeting"), "hello");
  assert.equal(await client.evaluate("shop/prices/price", { size: "none" }), undefined);
  assert.deepEqual(statuses, [200, 200, 200, 200]);
  const input = { text: "ä \u0000 \u{1f600}", list: [1, 2.5, null, true, {}] };
  assert.deepEqual(await client.evaluate("shop/prices/echo", input), input);
  const opts = { fromResult: (result) => `${result} euros` };
  assert.equal(await client.evaluate("shop/prices/price", { size: "large" }, opts), "20 euros");
});

test("a batch of which all are answered", async () => {
  const inputs = { "a/b": { size: "small" }, "": { size: "large" }, ü: { size: "none" } };
  assert.deepEqual(await client.evaluateBatch("shop/prices/price", inputs), { "a/b": 10, "": 20, ü: undefined });
  assert.deepEqual(await client.evaluateBatch("shop/prices/price", {}), {});
  assert.deepEqual(statuses, [200, 200]);
});

test("a batch of hundreds", async () => {
  const inputs = Object.fromEntries(Array.from({ length: 500 }, (_, i) => [`k${i}`, { i, pad: "x".repeat(i) }]));
  assert.deepEqual(await client.evaluateBatch("shop/prices/echo", inputs), inputs);
  await assert.rejects(client.evaluateBatch("shop/prices/echo", { ...inputs, more: {} }), refused(413));
  assert.deepEqual(statuses, [200, 413]);
});

test("a batch of which some are answered", async () => {
  const inputs = { good: { size: "small" }, bad: { size: "disputed" }, none: { size: "none" } };
  const { good, bad, none } = await client.evaluateBatch("shop/prices/price", inputs);
  assert.equal(good, 10);
  assert.equal(none, undefined);
  assert.equal(bad.httpStatusCode, "500");
  assert.equal(bad.code, "internal_error");
  assert.match(bad.decisionId, /./);
  await assert.rejects(client.evaluateBatch("shop/prices/price", inputs, { rejectMixed: true }), bad.constructor);
  assert.deepEqual(statuses, [207, 207]);
});

test("a batch of which none is answered", async () => {
  const inputs = { one: { size: "disputed" }, two: { size: "disputed", n: 2 } };
  await assert.rejects(client.evaluateBatch("shop/prices/price", inputs), (e) => {
    assert.ok(e instanceof BatchServerError);
    assert.deepEqual(Object.keys(e.responses).sort(), ["one", "two"]);
    assert.equal(e.responses.one.code, "internal_error");
    return !!e.batchDecisionId;
  });
  assert.deepEqual(statuses, [500]);
});

test("each tenant answers for itself", async () => {
  const kiosk = clientOf("kiosk");
  assert.equal(await kiosk.evaluate("shop/prices/price", { size: "small" }), 11);
  const both = { small: { size: "small" }, large: { size: "large" } };
  assert.deepEqual(await kiosk.evaluateBatch("shop/prices/price", both), { small: 11, large: undefined });
  assert.deepEqual(await client.evaluateBatch("shop/prices/price", both), { small: 10, large: 20 });
});

test("what is refused is an error with its status", async () => {
  await assert.rejects(clientOf("shop", {}).evaluate("shop/prices/price", {}), refused(401));
  await assert.rejects(clientOf("shop", {}).evaluateBatch("shop/prices/price", { a: {} }), refused(401));
  await assert.rejects(clientOf("nobody").evaluate("shop/prices/price", {}), refused(404));
  await assert.rejects(client.evaluate("shop/prices", {}), refused(404));
  await assert.rejects(client.evaluateBatch("system/main", { a: {} }), refused(404));
  await assert.rejects(client.evaluate("shop/prices/price", { size: "disputed" }), refused(500));
  assert.deepEqual(statuses, [401, 401, 404, 404, 404, 500]);
});

test("the client of low level: metrics, provenance, IDs", async () => {
  const low = new OpaApiClient({ serverURL: `${gatehouse.url}/t/shop`, bearerAuth: token });
  const one = await low.executePolicyWithInput({
    path: "shop/prices/price",
    requestBody: { input: { size: "small" } },
    metrics: true,
    provenance: true,
  });
  const { result, decisionId, metrics, provenance } = one.successfulPolicyResponse;
  assert.equal(result, 10);
  assert.match(decisionId, /./);
  assert.ok(metrics.timer_server_handler_ns > 0, JSON.stringify(metrics));
  assert.ok(provenance, "provenance");

  const many = await low.executeBatchPolicyWithInput({
    path: "shop/prices/price",
    requestBody: { inputs: { a: { size: "small" }, b: { size: "small" }, c: { size: "disputed" } } },
    metrics: true,
    provenance: true,
  });
  const mixed = many.batchMixedResults;
  const { a, b, c } = mixed.responses;
  assert.deepEqual([a.result, b.result, c.code], [10, 10, "internal_error"]);
  assert.deepEqual([a.httpStatusCode, b.httpStatusCode, c.httpStatusCode], ["200", "200", "500"]);
  assert.equal(new Set([a.decisionId, b.decisionId, c.decisionId, mixed.batchDecisionId]).size, 4);
  assert.ok(mixed.metrics.timer_server_handler_ns > 0);
});

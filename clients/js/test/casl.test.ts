import assert from "node:assert/strict";
import { test } from "node:test";
import { createMongoAbility } from "@casl/ability";
import { createPermissions } from "@gatehouse-authz/permissions";
import { connectAbility, toCaslRules } from "@gatehouse-authz/permissions/casl";
import { startServer } from "./server.js";

test("an ability of CASL says what the list says", async () => {
  await using server = await startServer({ order: ["create", "list"], report: [] });
  const may = createPermissions<Record<string, string>>({ url: server.url, eventSource: false });
  const ability = createMongoAbility();
  const stop = connectAbility(may, ability);
  assert.equal(ability.can("list", "order"), false);
  await may.ready;
  assert.equal(ability.can("list", "order"), true);
  assert.equal(ability.can("cancel", "order"), false);
  assert.deepEqual(toCaslRules(may.state.list), [{ action: ["create", "list"], subject: "order" }]);
  server.change({ order: ["cancel"] });
  await may.refresh();
  assert.equal(ability.can("list", "order"), false);
  assert.equal(ability.can("cancel", "order"), true);
  may.close();
  assert.equal(ability.can("cancel", "order"), false);
  stop();
  assert.deepEqual(toCaslRules(null), []);
});

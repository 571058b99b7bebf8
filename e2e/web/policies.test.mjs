// The tenants of the order desk, asked by OPA itself.
import assert from "node:assert/strict";
import { execFile } from "node:child_process";
import { access } from "node:fs/promises";
import { test } from "node:test";
import { fileURLToPath } from "node:url";
import { promisify } from "node:util";

const here = (path) => fileURLToPath(new URL(path, import.meta.url));
const opa = process.env.OPA ?? here("../../.cache/opa-1.22.2");
const there = await access(opa).then(() => true, () => false);

for (const team of ["orders", "storefront"])
  test(`${team} decides as it should`, { skip: !there && "no OPA" }, async () => {
    const folder = here(`../../deploy/demo/${team}`);
    await promisify(execFile)(opa, ["check", "--strict", folder]);
    const { stdout } = await promisify(execFile)(opa, ["test", folder, here(`${team}_test.rego`)]);
    assert.match(stdout, /PASS/);
  });

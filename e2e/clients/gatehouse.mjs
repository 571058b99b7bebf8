// A real gatehouse, with tenants made of a few files.
import { spawn } from "node:child_process";
import { mkdir, mkdtemp, rm, writeFile } from "node:fs/promises";
import { tmpdir } from "node:os";
import { dirname, join } from "node:path";
import { createInterface } from "node:readline";
import { fileURLToPath } from "node:url";

const binary = process.env.GATEHOUSE_BIN ?? fileURLToPath(new URL("../../bin/gatehouse", import.meta.url));

/**
 * Starts one: `config` is what its file says beside the addresses, and `tenants` has the files of each tenant by
 * their paths. Gives its URL, and what ends it.
 */
export async function startGatehouse({ config, tenants }) {
  const dir = await mkdtemp(join(tmpdir(), "gatehouse-clients-"));
  for (const [tenant, files] of Object.entries(tenants))
    for (const [path, text] of Object.entries(files)) {
      const file = join(dir, "tenants", tenant, path);
      await mkdir(dirname(file), { recursive: true });
      await writeFile(file, text);
    }
  const file = join(dir, "gatehouse.yaml");
  const listen = Object.fromEntries(["grpc", "http", "admin"].map((name) => [name, { listen: "127.0.0.1:0" }]));
  await writeFile(file, JSON.stringify({ ...listen, drain: { delay: "0s" }, ...config })); // JSON is YAML
  const server = spawn(binary, ["serve", "-log-format=json", "-c", file, join(dir, "tenants")], {
    stdio: ["ignore", "ignore", "pipe"],
  });
  const ended = new Promise((resolve) => server.on("exit", resolve).on("error", resolve));
  const close = async () => {
    server.kill();
    await ended;
    await rm(dir, { recursive: true });
  };
  let said = "";
  for await (const line of createInterface(server.stderr)) {
    said += `${line}\n`;
    const { msg, http, admin } = JSON.parse(line);
    if (msg !== "serving") continue;
    server.stderr.resume(); // it may go on to speak
    return { url: `http://${http}`, admin: `http://${admin}`, close };
  }
  await close();
  throw new Error(`gatehouse does not start:\n${said}`);
}

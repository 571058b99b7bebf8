// The real order desk: what "make demo" starts, on ports that the system chooses.
import { spawn } from "node:child_process";
import { createInterface } from "node:readline";

/**
 * Starts it, with the binaries that the demo finds in its environment, and with the S3 server that
 * GATEHOUSE_E2E_VERSITYGW names. Gives its URL, and what ends it.
 */
export async function startDemo(binary) {
  const s3 = process.env.GATEHOUSE_E2E_VERSITYGW;
  const demo = spawn(binary, ["-port=0", "-desk=0", ...(s3 ? [`-s3=${s3}`] : [])], {
    stdio: ["ignore", "pipe", "pipe"],
  });
  const ended = new Promise((resolve) => demo.on("exit", resolve).on("error", resolve));
  const close = async () => {
    demo.kill();
    await ended;
  };
  let said = "";
  demo.stderr.setEncoding("utf8").on("data", (text) => (said += text));
  for await (const line of createInterface(demo.stdout)) {
    said += `${line}\n`;
    const [, url] = /^The order desk is at (http:[^, ]+)/.exec(line) ?? [];
    if (!url) continue;
    demo.stdout.resume(); // it may go on to speak
    return { url, close };
  }
  await close();
  throw new Error(`the demo does not start:\n${said}`);
}

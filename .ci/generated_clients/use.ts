// What a dashboard asks, by the types that openapi-typescript generates. Argument: the service's address.

import createClient from "openapi-fetch";
import type { components, paths } from "./schema.js";

const client = createClient<paths>({ baseUrl: process.argv[2] ?? "" });

function told<T>(reply: { data?: T; error?: components["schemas"]["Problem"] }): T {
  if (reply.data === undefined) throw new Error(`${reply.error?.code}: ${reply.error?.detail}`);
  return reply.data;
}

const page: components["schemas"]["RunPage"] = told(await client.GET("/runs", { params: { query: { limit: 10 } } }));
if (!page.runs.some((run) => run.run === "generated" && run.observations === 4)) throw new Error(JSON.stringify(page));
const report = told(await client.GET("/runs/{run}/report", { params: { path: { run: "generated" } } }));
if (report.windows[0]?.observations !== 4) throw new Error(JSON.stringify(report.windows));
const { error } = await client.GET("/runs/{run}", { params: { path: { run: "missing" } } });
if (error?.code !== "run_unknown") throw new Error(JSON.stringify(error));

import { useEffect, useRef, useState } from "preact/hooks";
import type uPlot from "uplot";
import { call, may } from "../api";
import type { History, HistorySeries } from "../generated";
import { link, route, setQuery } from "../router";
import { myRoles } from "../session";
import { useStore } from "../store";
import { Empty, Load, Page, Section, Spark, Table, Text, count, figure, localTime, useLoad } from "../ui";

const spans: [value: string, name: string, seconds: number][] = [
  ["1h", "1 hour", 3600], ["6h", "6 hours", 21600], ["1d", "1 day", 86400], ["7d", "7 days", 604800], ["30d", "30 days", 2592000], ["90d", "90 days", 7776000],
];

const charts: { title: string; note: string; series: string[]; /** some: only those that are not always zero */ some?: boolean }[] = [
  { title: "Signatures and verifications", note: "Answered, each second.", series: ["signatures", "verifications"] },
  { title: "Refusals", note: "All, and times that a limit was reached.", series: ["refused", "replays", "rate_limited", "unavailable"] },
  { title: "Refusals by code", note: "The codes that occurred in this time.", some: true, series: ["replays", "denied", "restored", "expired", "invalid_signature", "wrong_signer", "unknown_key", "key_not_active", "key_rotated", "not_confirmed", "not_yet_valid", "lifetime_too_long", "malformed", "unsupported", "too_large", "busy", "unavailable"] },
  { title: "Time of a request", note: "Median and 99th percentile; a longer step has the worst one.", series: ["sign_p50", "sign_p99", "verify_p50", "verify_p99"] },
  { title: "Time by stage", note: "99th percentile.", series: ["decode_p99", "policy_p99", "ledger_p99", "turn_p99", "device_p99", "answer_p99"] },
  { title: "Handshakes", note: "Each second.", series: ["handshakes", "handshakes_failed", "handshakes_timeout"] },
  { title: "Queues", note: "The largest number in a step.", series: ["waiting", "serving", "ledger_waiting", "backlog"] },
  { title: "Connections", note: "Of peers.", series: ["connections", "connections_unproven"] },
  { title: "Disk", note: "Of the ledger.", series: ["disk_free", "ledger_size"] },
];

export function Figures() {
  const { query } = useStore(route);
  const chosen = spans.find((s) => s[0] === query.get("span")) ?? spans[0]!;
  const of = useLoad(async (signal) => {
    const now = Math.floor(Date.now() / 1000);
    const read = (since: number, until: number, series: string[]) => call("GET /v1/history", { query: { series: series.join(), since, until }, signal });
    // An answer has at most 200,000 values: 23 series of 90 days. The second part has the steps of the first.
    const wanted = [...new Set(charts.flatMap((c) => c.series))];
    const first = await read(now - chosen[2], now, wanted.slice(0, 20));
    const rest = [];
    for (let at = 20; at < wanted.length; at += 20) rest.push(read(first.since, first.until, wanted.slice(at, at + 20)));
    return { ...first, series: [first, ...await Promise.all(rest)].flatMap((h) => h.series) };
  }, [chosen[0]]);
  return <Page title="Figures" lead="What the appliance has done. The history has 10 s for two hours, 1 min for two days and 15 min for 90 days."
    actions={<><label>Time <select aria-label="Time" value={chosen[0]} onChange={(e) => setQuery({ span: e.currentTarget.value })}>{spans.map(([v, n]) => <option value={v} key={v}>{n}</option>)}</select></label>
      <button type="button" onClick={of.reload}>Now</button></>}>
    <Load of={of}>{(h) => <>{charts.map((c) => {
      const series = c.series.map((n) => h.series.find((s) => s.name === n)).filter((s): s is HistorySeries => !!s && (!c.some || s.values.some((v) => v !== null && v > 0)));
      return <Section title={c.title} note={c.note} key={c.title}>
        {series.length ? <Chart title={c.title} h={h} series={series} /> : <Empty title="None in this time." />}
      </Section>;
    })}</>}</Load>
    {may(myRoles(), "GET /v1/activity") && <Busiest />}
  </Page>;
}

/** Busiest shows the peers with the most answers in the last hour. */
function Busiest() {
  const of = useLoad((signal) => call("GET /v1/activity", { query: { limit: 50 }, signal }), []);
  const sum = (all: number[]) => all.reduce((n, x) => n + x, 0);
  return <Section title="By peer" note="Answers in the last hour, since the start of the daemon. The busiest 50 peers." actions={<button type="button" onClick={of.reload}>Look again</button>}>
    <Load of={of}>{(all) => <Table name="Answers by peer" rows={all} id={(a) => a.name} empty={<Empty title="No peer was answered in the last hour.">Each answer to a peer counts here.</Empty>} columns={[
      { head: "Peer", name: true, cell: (a) => <a href={link("peers", a.name)}><Text>{a.name}</Text></a> },
      { head: "Signatures", num: true, cell: (a) => count(sum(a.signatures)) },
      { head: "Verifications", num: true, cell: (a) => count(sum(a.verifications)) },
      { head: "Refused", num: true, cell: (a) => count(sum(a.refused)) },
      { head: "Others", num: true, quiet: true, cell: (a) => count(sum(a.others)) },
      { head: "Each minute", quiet: true, cell: (a) => <Spark label={"Answers to " + a.name + " in each minute"} values={a.signatures.map((n, i) => n + a.verifications[i]! + a.refused[i]! + a.others[i]!)} /> },
    ]} />}</Load>
  </Section>;
}

/** dashes tell the lines apart without their colours. */
const dashes = [[], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [12, 4]];
/** dashOf gives lines of the same colour different dashes. */
const dashOf = (i: number) => dashes[(i + Math.floor(i / dashes.length)) % dashes.length]!;

function Chart({ title, h, series }: { title: string; h: History; series: HistorySeries[] }) {
  const box = useRef<HTMLDivElement>(null);
  const all = series[0]?.values.length ?? 0;
  // A history that begins later than asked for fills the chart all the same.
  const begin = Math.max(0, Math.min(all - 12, ...h.series.map((s) => s.values.findIndex((v) => v !== null)).filter((i) => i >= 0)) - 1);
  const n = all - begin;
  series = series.map((s) => ({ ...s, values: s.values.slice(begin) }));
  const times = Array.from({ length: n }, (_, i) => h.since + (begin + i) * h.step);
  const unit = series[0]?.unit ?? "";
  const [table, setTable] = useState(false);
  useEffect(() => {
    const into = box.current!;
    let plot: uPlot | undefined, over = false;
    const css = getComputedStyle(document.documentElement);
    const of = (name: string) => css.getPropertyValue(name).trim();
    const colours = [of("--mark"), of("--crit"), of("--info"), of("--warn"), of("--off"), of("--ok")];
    const draw = (Plot: typeof uPlot) => {
      if (over) return;
      const axis = { stroke: of("--quiet"), grid: { stroke: of("--rule"), width: 1 }, ticks: { stroke: of("--rule"), width: 1 }, font: "12px " + of("--sans") };
      plot = new Plot({
        width: into.clientWidth, height: 190, padding: [null, 28, null, null], legend: { show: false }, cursor: { drag: { x: false, y: false } },
        scales: { y: { range: (_u, _min, max) => [0, max > 0 ? max * 1.08 : 1] } },
        axes: [{ ...axis, space: 70, values: (_u, all) => all.map((t) => h.step > 60 && new Date(t * 1000).getHours() === 0 ? localTime(t * 1000, false).split(",")[0]! : localTime(t * 1000, h.step < 60 && n * h.step < 900).split(", ").pop()!) }, { ...axis, size: 68, values: (_u, all) => all.map((v) => figure(v, unit)) }],
        series: [{}, ...series.map((s, i) => ({ label: s.name, stroke: colours[i % colours.length]!, width: 1.5, dash: dashOf(i), points: { size: 3 }, spanGaps: false }))],
      }, [times, ...series.map((s) => s.values as (number | null)[])] as uPlot.AlignedData, into);
    };
    void import("uplot").then((m) => draw(m.default));
    const sized = new ResizeObserver(() => plot?.setSize({ width: into.clientWidth, height: 190 }));
    sized.observe(into);
    return () => { over = true; sized.disconnect(); plot?.destroy(); };
  }, [h]);
  const last = (s: HistorySeries) => [...s.values].reverse().find((v) => v !== null) ?? null;
  const most = (s: HistorySeries) => s.values.reduce<number | null>((m, v) => v === null ? m : m === null ? v : Math.max(m, v), null);
  return <div class="chart">
    <div ref={box} role="img" aria-label={`${title}: ${series.map((s) => `${s.name}, now ${figure(last(s), s.unit)}, at most ${figure(most(s), s.unit)}`).join("; ")}`} />
    <ul class="legend">{series.map((s, i) => <li key={s.name} title={s.help}><svg width="26" height="8" aria-hidden="true"><path class={"line" + i % dashes.length} d="M0 4h26" stroke-dasharray={dashOf(i).join(" ")} /></svg>{s.name.replaceAll("_", " ")} <span class="quiet">{figure(last(s), s.unit)}</span></li>)}</ul>
    <details onToggle={(e) => setTable(e.currentTarget.open)}><summary>As a table</summary>
      {table && <div class="scroll" tabIndex={0} role="region" aria-label={title + " as a table"}><table class="plain"><thead><tr><th scope="col">Time</th>{series.map((s) => <th scope="col" class="num" key={s.name}>{s.name.replaceAll("_", " ")}</th>)}</tr></thead>
        <tbody>{times.map((t, i) => ({ t, i })).filter(({ i }) => i % Math.max(1, Math.ceil(n / 60)) === 0).map(({ t, i }) => <tr key={t}><td>{localTime(t * 1000)}</td>{series.map((s) => <td class="num" key={s.name}>{figure(s.values[i] ?? null, s.unit)}</td>)}</tr>)}</tbody></table></div>}
    </details>
  </div>;
}

import { useEffect, useRef, useState } from "preact/hooks";
import type uPlot from "uplot";
import { call } from "../api";
import type { History, HistorySeries } from "../generated";
import { route, setQuery } from "../router";
import { useStore } from "../store";
import { Load, Page, Section, figure, localTime, useLoad } from "../ui";

const spans: [value: string, name: string, seconds: number][] = [
  ["1h", "1 hour", 3600], ["6h", "6 hours", 21600], ["1d", "1 day", 86400], ["7d", "7 days", 604800], ["30d", "30 days", 2592000], ["90d", "90 days", 7776000],
];

const charts: { title: string; note: string; series: string[] }[] = [
  { title: "Signatures and verifications", note: "Answered, each second.", series: ["signatures", "verifications"] },
  { title: "Refusals", note: "By what refused them.", series: ["refused", "denied", "replays", "rate_limited", "busy", "unavailable"] },
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
  const wanted = [...new Set(charts.flatMap((c) => c.series))].join();
  const of = useLoad(async (signal) => {
    const now = Math.floor(Date.now() / 1000);
    return call("GET /v1/history", { query: { series: wanted, since: now - chosen[2], until: now }, signal });
  }, [chosen[0]]);
  return <Page title="Figures" lead="What the appliance has done. The history has 10 s for two hours, 1 min for two days and 15 min for 90 days."
    actions={<><label>Time <select aria-label="Time" value={chosen[0]} onChange={(e) => setQuery({ span: e.currentTarget.value })}>{spans.map(([v, n]) => <option value={v} key={v}>{n}</option>)}</select></label>
      <button type="button" onClick={of.reload}>Now</button></>}>
    <Load of={of}>{(h) => <>{charts.map((c) => <Section title={c.title} note={c.note} key={c.title}>
      <Chart title={c.title} h={h} series={c.series.map((n) => h.series.find((s) => s.name === n)).filter((s): s is HistorySeries => !!s)} />
    </Section>)}</>}</Load>
  </Page>;
}

/** dashes tell the lines apart without their colours. */
const dashes = [[], [6, 3], [2, 2], [8, 3, 2, 3], [1, 3], [12, 4]];

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
        width: into.clientWidth, height: 190, legend: { show: false }, cursor: { drag: { x: false, y: false } },
        scales: { y: { range: (_u, _min, max) => [0, max > 0 ? max * 1.08 : 1] } },
        axes: [{ ...axis, space: 70, values: (_u, all) => all.map((t) => h.step > 60 && new Date(t * 1000).getHours() === 0 ? localTime(t * 1000, false).split(",")[0]! : localTime(t * 1000, h.step < 60 && n * h.step < 900).split(", ").pop()!) }, { ...axis, size: 68, values: (_u, all) => all.map((v) => figure(v, unit)) }],
        series: [{}, ...series.map((s, i) => ({ label: s.name, stroke: colours[i % colours.length]!, width: 1.5, dash: dashes[i % dashes.length]!, points: { size: 3 }, spanGaps: false }))],
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
    <ul class="legend">{series.map((s, i) => <li key={s.name} title={s.help}><svg width="26" height="8" aria-hidden="true"><path class={"line" + i} d="M0 4h26" stroke-dasharray={dashes[i % dashes.length]!.join(" ")} /></svg>{s.name.replaceAll("_", " ")} <span class="quiet">{figure(last(s), s.unit)}</span></li>)}</ul>
    <details onToggle={(e) => setTable(e.currentTarget.open)}><summary>As a table</summary>
      {table && <div class="scroll" tabIndex={0} role="region" aria-label={title + " as a table"}><table class="plain"><thead><tr><th scope="col">Time</th>{series.map((s) => <th scope="col" class="num" key={s.name}>{s.name.replaceAll("_", " ")}</th>)}</tr></thead>
        <tbody>{times.map((t, i) => ({ t, i })).filter(({ i }) => i % Math.max(1, Math.ceil(n / 60)) === 0).map(({ t, i }) => <tr key={t}><td>{localTime(t * 1000)}</td>{series.map((s) => <td class="num" key={s.name}>{figure(s.values[i] ?? null, s.unit)}</td>)}</tr>)}</tbody></table></div>}
    </details>
  </div>;
}

"""A report as a page without scripts, for people and for paper. Each value passes `text`: hosts wrote some of them."""

import html
from collections.abc import Callable
from typing import Any

from llmkeep.errors import printable
from llmproof.report import VERDICT_NAMES

LANGUAGES = ("en", "zh")
CHINESE = {
    "Controls and checks": "控制项与检查", "Standard": "标准", "Mapping reviewed by": "映射审阅人", "nobody": "无人",
    "Control node": "控制节点", "Operator": "操作员", "Checks began": "检查开始", "Checks ended": "检查结束",
    "Bundle": "软件包序号", "Tree": "代码版本", "Inventory (SHA-256)": "清单 (SHA-256)", "Head of the record": "审计记录签名头",
    "Summary": "汇总", "Verdict": "结论", "Number": "数量", "Control": "控制项", "Controls": "控制项", "About": "内容",
    "Checks on hosts": "各主机上的检查",
    "Evidence": "证据", "Host": "主机", "Check": "检查", "State": "状态", "Expected": "期望", "Observed": "实际",
    "Not shown here": "此处未证明", "Heads of hosts' records": "各主机审计记录签名头", "did not answer": "无应答",
    "The standard's text was not compared; nothing here counts as met.": "未与标准原文核对，任何一项均不计为符合。",
    "no check looks at it": "没有检查涉及此项",
    "the checks show the technical part; procedures are for the organisation": "检查只证明技术部分，流程由组织负责",
    "No host ran a check.": "没有主机运行检查。",
    "No verdict but the first counts as met.": "只有第一种结论计为符合。",
    "met": "符合", "partly": "部分", "not met": "不符合", "not shown": "未证明", "no check": "无检查",
    "organisation": "由组织回答", "unreviewed": "未审阅", "ok": "通过", "failed": "失败", "accepted": "清单已接受",
    "error": "错误", "not enforceable": "内核无法强制", "skipped": "未运行", "undeclared": "未要求",
    "Vulnerabilities": "漏洞", "Vulnerability": "漏洞", "Database": "漏洞库", "As of": "截至",
    "Problem": "问题", "Unknown": "未知", "Waiver": "豁免", "until": "有效期至", "expired": "已过期",
    "Something is unknown, so no host counts as free of vulnerabilities.": "存在未知项，任何主机均不得视为无漏洞。",
    "Package": "软件包", "Fixed version": "修复版本", "Running in": "运行于",
    "cannot be seen": "无法观察", "critical": "严重", "high": "高", "medium": "中", "low": "低", "unassigned": "未评级",
    "undetermined": "未判定",
    "Installed components": "已安装组件", "Components": "组件数", "Of no bundle": "不属于任何软件包", "Missing": "缺少",
    "No SBOM was made, so it is not known what hosts have installed.": "尚未生成 SBOM，各主机已安装的内容未知。",
    "A host did not answer, so this is not complete.": "有主机无应答，清单不完整。",
}  # fmt: skip
STYLE = (
    "body{font:14px/1.5 sans-serif;margin:2em auto;max-width:70em;padding:0 1em;color:#111;background:#fff}"
    "table{border-collapse:collapse;width:100%;margin:.5em 0 1.5em}"
    "td,th{border:1px solid #999;padding:.25em .5em;text-align:left;vertical-align:top;overflow-wrap:anywhere}"
    "td:first-child{min-width:7em}pre{white-space:pre-wrap;margin:0;font-size:12px}tr{break-inside:avoid}"
    "@media print{body{margin:0;max-width:none;font-size:10px}a{color:inherit;text-decoration:none}}"
)


def text(value: object) -> str:
    """VALUE for a page: escaped, without control characters, bidirectional ones among them."""
    return html.escape(printable(str(value)))


def spoken(language: str) -> Callable[[str], str]:
    """Our own words in one of LANGUAGES, for a page."""
    return lambda words: text(CHINESE.get(words, words) if language == "zh" else words)


def page(results: dict[str, Any], verdicts: list[dict[str, Any]], language: str, *sections: str) -> str:
    """The page in one of LANGUAGES, with further SECTIONS in it before the evidence."""
    say = spoken(language)
    standard, hosts = results["standard"], results["hosts"]
    title = f"{text(standard['title'])} {text(standard['version'])}"
    numbers = {name: number for number, name in enumerate(sorted(hosts))}
    reviewer = say("nobody") if standard["reviewed_by"] == "nobody" else text(standard["reviewed_by"])
    facts = [
        ("Standard", title), ("Mapping reviewed by", reviewer),
        *((label, text(results[name])) for label, name in (
            ("Control node", "control_node"), ("Operator", "operator"), ("Checks began", "begun"),
            ("Checks ended", "ended"), ("Bundle", "bundle_serial"), ("Tree", "tree_revision"),
            ("Inventory (SHA-256)", "inventory_sha256"))),
        ("Head of the record", f"<pre>{text(results['record_head'])}</pre>"),
    ]  # fmt: skip
    parts = [
        f'<!DOCTYPE html>\n<html lang="{language}"><head><meta charset="utf-8">',
        "<meta http-equiv=\"Content-Security-Policy\" content=\"default-src 'none'; style-src 'unsafe-inline'\">",
        f"<title>{title}</title><style>{STYLE}</style></head><body>",
        f"<h1>{say('Controls and checks')}: {title}</h1>",
        f"<p>{say('No verdict but the first counts as met.')}</p>",
        f"<p>{say("The standard's text was not compared; nothing here counts as met.")}</p>"
        if standard.get("unreviewed")
        else "",
        table([], [[say(label), value] for label, value in facts]),
        f"<h2>{say('Summary')}</h2>",
        table(
            [say("Verdict"), say("Number")],
            [[say(name), str(sum(each["verdict"] == name for each in verdicts))] for name in VERDICT_NAMES],
        ),
        f"<h2>{say('Controls')}</h2>",
    ]
    rows = []
    for control, each in zip(standard["controls"], verdicts, strict=True):
        by_check: dict[str, list[str]] = {}
        for row in each["checks"]:
            link = f'<a href="#h{numbers[row["host"]]}">{text(row["host"])}</a>'
            by_check.setdefault(row["check"], []).append(f"{link} {say(row['state'])}")
        checks = "<br>".join(f"{text(check)}: {', '.join(places)}" for check, places in by_check.items())
        if not checks and control.get("checks"):
            checks = f"{', '.join(map(text, control['checks']))}: {say('No host ran a check.')}"
        limits = [say(control[name]) for name in ("partly", "missing") if control.get(name)]
        lines = [f"{say('Not shown here')}: {limit}" for limit in limits]
        about = "<br>".join([text(control.get("title", "")), *lines])
        rows.append([text(control["id"]), about, say(each["verdict"]), checks])
    parts.append(table([say(name) for name in ("Control", "About", "Verdict", "Checks on hosts")], rows))
    parts += sections
    parts.append(f"<h2>{say('Evidence')}</h2>")
    for name, number in numbers.items():
        silent = "" if hosts[name]["answers"] else f" ({say('did not answer')})"
        parts.append(f'<h3 id="h{number}">{text(name)}{silent}</h3>')
        parts.append(
            table(
                [say(label) for label in ("Check", "State", "Expected", "Observed")],
                [
                    [
                        f"{text(check['id'])}<br>{text(check['title'])}",
                        say(check["state"]) + (f"<br>{text(check['reason'])}" if "reason" in check else ""),
                        f"<pre>{text(check['expected'])}</pre>",
                        f"<pre>{text(check['observed'])}</pre>",
                    ]
                    for check in hosts[name]["checks"]
                ],
            )
        )
    if results["witnessed_heads"]:
        heads = [
            [text(name), f"<pre>{text(note)}</pre>"] for name, note in results["witnessed_heads"].items()
        ]
        parts += [f"<h2>{say("Heads of hosts' records")}</h2>", table([], heads)]
    return "\n".join([*filter(None, parts), "</body></html>", ""])


def table(head: list[str], rows: list[list[str]]) -> str:
    """A table of cells that are HTML already."""
    lines = [f"<tr>{''.join(f'<th>{cell}</th>' for cell in head)}</tr>"] if head else []
    lines += [f"<tr>{''.join(f'<td>{cell}</td>' for cell in row)}</tr>" for row in rows]
    return "<table>\n" + "\n".join(lines) + "\n</table>"

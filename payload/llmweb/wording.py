"""What pages say, in English and in Chinese. Names of metrics, hosts, models and alerts are the estate's own."""

from typing import Literal

Language = Literal["en", "zh"]
LANGUAGES: tuple[Language, ...] = ("en", "zh")
TAGS = {"en": "en", "zh": "zh-Hans"}
THEMSELVES = {"en": "English", "zh": "中文"}

WORDS: dict[str, tuple[str, str]] = {
    "site": ("Operator page", "运维页面"),
    "skip": ("Skip to content", "跳到正文"),
    "pages": ("Pages", "页面"),
    "overview": ("Overview", "总览"),
    "hosts": ("Hosts", "主机"),
    "models": ("Models", "模型"),
    "gpus": ("GPUs", "GPU"),
    "training": ("Training", "训练"),
    "alerts": ("Alerts", "告警"),
    "language": ("Language", "语言"),
    "signed_in": ("Signed in as {subject}", "已登录：{subject}"),
    "sign_in": ("Sign in", "登录"),
    "sign_out": ("Sign out", "退出"),
    "api_key": ("API key", "API 密钥"),
    "sign_in_hint": (
        "A key whose role may see this page. It opens a session, which ends with the key, after 30 idle minutes or 8 hours.",
        "请输入有权查看本页的主体的密钥。密钥换成本浏览器的会话；30 分钟未使用、满 8 小时或密钥失效，会话即结束。",
    ),
    "as_of": ("As of {at}. Reload the page for newer values.", "截至 {at}。刷新页面可获得新值。"),
    "no_data": ("no data", "无数据"),
    "no_data_since": ("No data since {at}", "自 {at} 起无数据"),
    "no_data_yet": ("No data since this page started", "本页面启动以来无数据"),
    "no_data_long": ("No data in the last 6 hours, or never", "最近 6 小时内无数据，或从未有过"),
    "unreachable": ("Prometheus does not answer", "Prometheus 无应答"),
    "absent": ("Prometheus has no values of it", "Prometheus 中没有对应的值"),
    "alertmanager_away": (
        "Alertmanager does not answer: whether alerts are delivered is unknown.",
        "Alertmanager 无应答：告警是否送达未知。",
    ),
    "no_heartbeat": (
        "No heartbeat: the alert Watchdog, which always fires, does not. What else should fire is unknown.",
        "无心跳：应始终触发的告警 Watchdog 未触发。其他告警是否应触发未知。",
    ),
    "left_out": ("{count} more are not shown.", "另有 {count} 项未显示。"),
    "as_table": ("{title}: as a table", "{title}：表格"),
    "plot_of": (
        "Lines over {hours} hours. Last values: {values}.",
        "最近 {hours} 小时的曲线。最新值：{values}。",
    ),
    "none_firing": ("No alert fires.", "没有触发中的告警。"),
    "no_objectives": (
        "This page was given no objectives: none of the watched hosts serves.",
        "未配置目标：受监视的主机均不提供服务。",
    ),
    "no_runs": (
        "No training run has exported metrics in the last 7 days.",
        "最近 7 天内没有训练任务导出指标。",
    ),
    "no_gpus": ("No GPU has exported metrics in the last 7 days.", "最近 7 天内没有 GPU 导出指标。"),
    "name": ("Name", "名称"),
    "value": ("Value", "值"),
    "state": ("State", "状态"),
    "time": ("Time", "时间"),
    "host": ("Host", "主机"),
    "model": ("Model", "模型"),
    "gpu": ("GPU", "GPU"),
    "job": ("Job", "任务"),
    "source": ("Source", "来源"),
    "up": ("up", "正常"),
    "down": ("down", "中断"),
    "partly": ("{up} of {all} up", "{all} 个中 {up} 个正常"),
    "objectives": ("Objectives", "服务目标"),
    "objective": ("Objective", "目标"),
    "promise": ("Promise in {days} days", "{days} 天内的承诺"),
    "kept": ("Kept so far", "目前达到"),
    "budget": ("Budget left", "剩余预算"),
    "spent": ("used up", "已用尽"),
    "bad_share": ("Bad events in 1 hour, by objective", "1 小时内未达标的比例，按目标"),
    "firing": ("Firing alerts", "触发中的告警"),
    "alert": ("Alert", "告警"),
    "severity": ("Severity", "级别"),
    "page": ("page", "立即处理"),
    "ticket": ("ticket", "工作时间处理"),
    "since": ("Since", "开始时间"),
    "summary": ("Summary", "摘要"),
    "runbook": ("Runbook", "处置手册"),
    "delivery": ("Delivery", "送达"),
    "at_alertmanager": ("at Alertmanager", "已到 Alertmanager"),
    "suppressed": ("silenced or inhibited", "已静默或被抑制"),
    "undelivered": ("not at Alertmanager", "未到 Alertmanager"),
    "unknown": ("unknown", "未知"),
    "estate": ("Bundle, record and checks", "软件包、审计记录与检查"),
    "bundle_serial": ("Bundle serial", "软件包序号"),
    "site_serial": ("Bundle serial that all hosts have", "全部主机已应用的软件包序号"),
    "verify_failed": ("Checks that failed then", "其中未通过的检查"),
    "never": ("never", "从未"),
    "silent": ("Does not answer", "无应答的来源"),
    "audit_look": ("Last look at the audit record", "最近一次检查审计记录"),
    "audit_altered": ("Alterations of the audit record", "审计记录被改动处"),
    "failed_units": ("Failed units", "失败的单元"),
    "certificates": ("First certificate ends in", "最早到期的证书剩余"),
    "verify": ("Last verify", "最近一次 verify"),
    "drift": ("Files that drifted", "发生漂移的文件"),
    "backup": ("Last backup", "最近一次备份"),
    "ago": ("{age} ago", "{age}前"),
    "processor": ("Processor", "处理器"),
    "memory": ("Memory", "内存"),
    "fullest_disk": ("Fullest disk", "最满的磁盘"),
    "processor_plot": ("Processors in use, by host", "处理器使用率，按主机"),
    "memory_plot": ("Memory in use, by host", "内存使用率，按主机"),
    "instances": ("Engines that answer", "应答的引擎"),
    "running": ("Running", "处理中"),
    "waiting": ("Waiting", "排队"),
    "requests_s": ("Requests/s", "请求/秒"),
    "tokens_s": ("Tokens/s", "词元/秒"),
    "fast_tokens": ("First token within 0.5 s (1 h)", "0.5 秒内首个词元（1 小时）"),
    "first_token_plot": (
        "Time to first token, P99 by model (estimated within its bucket)",
        "首个词元时间 P99，按模型（桶内估计）",
    ),
    "requests_plot": ("Requests per second, by model", "每秒请求，按模型"),
    "waiting_plot": ("Waiting requests, by model", "排队的请求，按模型"),
    "busy": ("Busy", "使用率"),
    "gpu_memory": ("Memory", "显存"),
    "temperature": ("Temperature", "温度"),
    "power": ("Power", "功率"),
    "findings": ("Findings", "异常"),
    "xids": ("Xids (24 h)", "Xid（24 小时）"),
    "none": ("none", "无"),
    "missing": ("does not answer", "无应答"),
    "busy_plot": ("GPUs: busy share", "GPU 使用率"),
    "temperature_plot": ("GPUs: temperature", "GPU 温度"),
    "runs": ("Recent runs", "近期任务"),
    "step": ("Step", "步"),
    "loss": ("Loss", "损失"),
    "left": ("Left", "剩余时间"),
    "over": ("ended or silent", "已结束或无输出"),
    "loss_plot": ("Loss, by job", "损失，按任务"),
    "refused": ("Refused", "拒绝"),
    "back": ("To the overview", "返回总览"),
    "request_id": ("Request id: {id}", "请求编号：{id}"),
}

# Of refusals, by code; others are said in the gateway's words.
REFUSALS: dict[str, tuple[str, str]] = {
    "missing_key": ("Send the API key.", "请输入 API 密钥。"),
    "malformed_key": (
        "The API key does not have the form llmk_<id>_<secret>: paste the whole key.",
        "API 密钥的格式不是 llmk_<id>_<secret>：请粘贴完整的密钥。",
    ),
    "invalid_key": (
        "The API key is wrong: check it, or request a new one.",
        "API 密钥错误：请检查，或申请新的密钥。",
    ),
    "revoked_key": ("The API key is revoked: request a new one.", "API 密钥已被吊销：请申请新的密钥。"),
    "expired_key": ("The API key has expired: request a new one.", "API 密钥已过期：请申请新的密钥。"),
    "denied": (
        "The policy does not let you see this page: ask for the role operator.",
        "策略不允许您查看本页：请申请 operator 角色。",
    ),
    "cross_site": (
        "The form was sent by another site, or by a browser that does not say by which: open this page, and sign in here.",
        "表单来自其他网站，或浏览器未说明来源：请打开本页后在此登录。",
    ),
    "unknown_path": ("There is no such page.", "没有这个页面。"),
    "policy_unavailable": (
        "The policy is unavailable, so nothing is allowed: retry later.",
        "策略不可用，因此一律拒绝：请稍后重试。",
    ),
    "audit_unavailable": (
        "The audit record cannot be written, so nothing is shown: retry later.",
        "无法写入审计记录，因此不显示任何内容：请稍后重试。",
    ),
}


def said(language: Language, name: str, **values: object) -> str:
    """The words of that name; raises KeyError for a name that there is not."""
    return WORDS[name][LANGUAGES.index(language)].format(**values)


def refusal(language: Language, code: str, otherwise: str) -> str:
    words = REFUSALS.get(code)
    return words[LANGUAGES.index(language)] if words else otherwise


def preferred(accepted: str) -> Language:
    """The language of an Accept-Language header; English where it names neither."""
    best: tuple[float, Language] = (0.0, "en")
    for part in accepted[:500].split(","):
        tag, _, rest = part.strip().partition(";")
        language = tag.strip().lower().partition("-")[0]
        try:
            weight = float(rest.strip().removeprefix("q=") or 1)
        except ValueError:
            continue
        for known in LANGUAGES:
            if language == known and weight > best[0]:
                best = (weight, known)
    return best[1]

"""The pages' texts in English and Chinese. Names of metrics, hosts, models and alerts are the estate's own."""

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
    "day": ("Last 24 hours", "最近 24 小时"),
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
    "no_data_long": ("No data in the last 6 hours, or ever", "最近 6 小时内无数据，或从未有过"),
    "unreachable": ("Prometheus does not answer", "Prometheus 无应答"),
    "absent": ("Prometheus has no values for it", "Prometheus 中没有对应的值"),
    "alertmanager_away": (
        "Alertmanager does not answer: whether alerts are delivered is unknown.",
        "Alertmanager 无应答：告警是否送达未知。",
    ),
    "no_heartbeat": (
        "No heartbeat: the alert Watchdog, which always fires, does not. It is unknown which other alerts should fire.",
        "无心跳：应始终触发的告警 Watchdog 未触发。其他告警是否应触发未知。",
    ),
    "left_out": ("{count} more are not shown.", "另有 {count} 项未显示。"),
    "as_table": ("{title}: as a table", "{title}：表格"),
    "plot_of": (
        "Lines over {hours} hours. Last values: {values}.",
        "最近 {hours} 小时的曲线。最新值：{values}。",
    ),
    "none_firing": ("No alert is firing.", "没有触发中的告警。"),
    "no_objectives": (
        "This page has no objectives: none of the watched hosts serves models.",
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
    "promise": ("Objective for {days} days", "{days} 天内的承诺"),
    "kept": ("Achieved so far", "目前达到"),
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
    "site_serial": ("Bundle serial on all hosts", "全部主机已应用的软件包序号"),
    "verify_failed": ("Checks that failed at that time", "其中未通过的检查"),
    "never": ("never", "从未"),
    "silent": ("Does not answer", "无应答的来源"),
    "audit_look": ("Last check of the audit record", "最近一次检查审计记录"),
    "audit_altered": ("Alterations of the audit record", "审计记录被改动处"),
    "failed_units": ("Failed units", "失败的单元"),
    "certificates": ("First certificate expires in", "最早到期的证书剩余"),
    "verify": ("Last verify", "最近一次 verify"),
    "drift": ("Drifted files", "发生漂移的文件"),
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
    "quantiles_plot": (
        "Time to first token, P50 and P99 of all models (estimated within their buckets)",
        "首个词元时间 P50 与 P99，全部模型（桶内估计）",
    ),
    "tokens_plot": ("Tokens per second, by kind", "每秒词元，按种类"),
    "errors_plot": (
        "Requests per minute that failed (5xx) or were rate-limited (429)",
        "每分钟失败（5xx）和暂时被拒（429）的请求",
    ),
    "gpus_plot": ("GPU utilisation, mean by host", "GPU 使用率，按主机平均"),
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
    # The experts' page.
    "reviews": ("Reviews", "复核"),
    "queue": ("Badly rated answers", "评分差的回答"),
    "this_host": (
        "Only this host, {host}: answers of other serving hosts wait on their own pages, if they were rated there.",
        "仅限本主机 {host}：其他服务主机的回答若在那里评分，则在各自的页面上等待复核。",
    ),
    "without_answer": (
        "Badly rated, but in no queue: {count}. The answers are not here: the text was not kept, or another host has it.",
        "评分差但不在任何队列中：{count} 条，其回答不在本主机上：文本未保存，或由其他主机给出。",
    ),
    "no_tenants": (
        "The policy names no tenant whose answers you may review: see reviewed_by in llm/tenants.",
        "策略未指定您可以复核哪个租户的回答：见 llm/tenants 中的 reviewed_by。",
    ),
    "none_waiting": ("No answers are waiting for a review.", "没有等待复核的回答。"),
    "review": ("Review an answer", "复核回答"),
    "to_queue": ("Back to the queue", "返回队列"),
    "asked": ("Prompt", "提示"),
    "answered": ("Answer", "回答"),
    "rating": ("Rating", "评分"),
    "reason": ("Reason", "原因"),
    "tenant": ("Tenant", "租户"),
    "rated_on": ("Rated", "评分时间"),
    "thumb_down": ("thumb down", "点踩"),
    "stars_of": ("{stars} of 5 stars", "{stars} 星（共 5 星）"),
    "users_comment": ("Comment of the user", "用户评论"),
    "users_correction": ("Correction of the user", "用户更正"),
    "your_review": ("Your review", "您的复核"),
    "reviewed": (
        "Reviewed by {by} on {at}: {verdict}. Your review will replace it.",
        "{by} 已于 {at} 复核：{verdict}。您提交的内容将取代它。",
    ),
    "corrected": ("corrected", "已更正"),
    "dismissed": ("dismissed", "已驳回"),
    "what_was_wrong": ("What was wrong with it", "问题所在"),
    "correction": ("Correction", "更正"),
    "correction_hint": (
        "The complete answer that should have been given, up to {most} characters, for training. Dismiss: nothing is used.",
        "应给出的完整回答，最多 {most} 个字符，将用于训练。驳回：不用于训练。",
    ),
    "correct": ("Save the correction", "保存更正"),
    "dismiss": ("Dismiss", "驳回"),
    "reason_wrong": ("wrong", "错误"),
    "reason_incomplete": ("incomplete", "不完整"),
    "reason_irrelevant": ("irrelevant", "答非所问"),
    "reason_harmful": ("harmful", "有害"),
    "reason_refused": ("refused", "拒绝回答"),
    "reason_too_long": ("too long", "太长"),
    "reason_too_short": ("too short", "太短"),
    "reason_style": ("style", "文风"),
    "reason_other": ("other", "其他"),
    "tag_factual": ("wrong fact", "事实错误"),
    "tag_fabricated": ("fabricated", "捏造内容"),
    "tag_reasoning": ("faulty reasoning", "推理错误"),
    "tag_outdated": ("outdated", "内容过时"),
    "tag_instructions": ("instructions not followed", "未遵循指令"),
    "tag_incomplete": ("incomplete", "不完整"),
    "tag_unsafe": ("unsafe", "不安全"),
    "tag_over_refusal": ("refused unnecessarily", "过度拒绝"),
    "tag_style": ("style or format", "文风或格式"),
    "tag_language": ("wrong language", "语言错误"),
    # The product owner's page.
    "experiments": ("Experiments", "实验"),
    "in_force": ("Experiments in force", "进行中的实验"),
    "no_experiments": ("The policy has no experiments.", "策略中没有实验。"),
    "experiment": ("Experiment", "实验"),
    "control": ("Control", "对照组"),
    "candidate": ("Candidate", "候选组"),
    "unit": ("Unit", "分组单位"),
    "unit_subject": ("subject", "用户"),
    "unit_request": ("request", "请求"),
    "has_candidate": ("Have the candidate", "候选组比例"),
    "found": ("Results so far", "目前的结论"),
    "not_shown": (
        "no data: the output of llmkeep experiment show --json was not copied to this host",
        "无数据：llmkeep experiment show --json 的输出未放到本主机",
    ),
    "unreadable": (
        "no data: the file is not the output of llmkeep experiment show --json",
        "无数据：文件不是 llmkeep experiment show --json 的输出",
    ),
    "shown_at": (
        "{experiment}: as of {at}, from ratings of the hosts whose outcomes were included.",
        "{experiment}：截至 {at}，依据已提供结果的主机上的评分。",
    ),
    "brought_at": (
        "{experiment}: copied on {at}, created at an unknown time, from ratings of the hosts whose outcomes were included.",
        "{experiment}：{at} 放到本主机；文件未注明截止时间。依据已提供结果的主机上的评分。",
    ),
    "no_verdict_yet": ("There are no outcomes yet.", "尚无结果。"),
    "interval": ("Candidate minus control, interval", "候选组减对照组，区间"),
    "verdict": ("Verdict", "结论"),
    "units": ("{count} units", "{count} 个单位"),
    "no_verdict": ("no verdict", "无结论"),
    "no_interval": ("not yet: too few units", "尚无：单位太少"),
    "verdict_better": ("better", "更好"),
    "verdict_worse": ("worse", "更差"),
    "verdict_undecided": ("undecided", "未定"),
    "metric_thumb": ("thumbs up", "点赞"),
    "metric_stars": ("stars", "星级"),
    "metric_corrected": ("corrected", "被更正"),
    "quality": ("Ratings of both arms at the present step", "两组的评分（当前阶段）"),
    "quality_note": (
        "Only from the journal of this host, {host}: without intervals, a difference may be chance. In brackets: ratings.",
        "仅依据本主机 {host} 的评分日志，不含区间：这里的差异可能出于偶然。括号内为评分数。",
    ),
    "quality_cut": (
        "Too much to hold in memory: only the first {most} subjects of an arm and the newest {most} ratings count.",
        "日志超出内存中可保留的数量：每组仅计前 {most} 个用户，评分仅计最新的 {most} 条。",
    ),
    "no_journal": ("This host keeps no ratings.", "本主机不保存评分。"),
    "journal_away": ("The journal of ratings cannot be read.", "无法读取评分日志。"),
    "counting": (
        "The journal is being counted: reload the page in a minute.",
        "正在统计评分日志：请一分钟后刷新页面。",
    ),
    "arm": ("Arm", "组"),
    "units_met": ("Units", "单位数"),
    "thumbs_up": ("Thumbs up", "点赞比例"),
    "stars_mean": ("Stars, mean", "平均星级"),
    "corrected_share": ("Corrected", "被更正比例"),
    "no_ratings": ("no ratings", "无评分"),
    "arms_first_token": (
        "Time to first token, P99 by arm's model (estimated within its bucket)",
        "首个词元时间 P99，按组的模型（桶内估计）",
    ),
    "no_line_of": ("No line, because there are no values: {models}.", "无曲线（没有数值）：{models}。"),
    "arms_failed": ("Failed answers, by arm's model", "失败的回答，按组的模型"),
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
        "The policy does not let you see this page: ask for a role that may see it.",
        "策略不允许您查看本页：请申请有权查看的角色。",
    ),
    "cross_site": (
        "The form was sent by another site, or by a browser that does not name the site: open this page, and sign in here.",
        "表单来自其他网站，或浏览器未说明来源：请打开本页后在此登录。",
    ),
    "unknown_path": ("There is no such page.", "没有这个页面。"),
    "no_such_answer": (
        "There is no such answer to review: it may have been forgotten, or you may not see it.",
        "没有这个待复核的回答：它可能已被删除，或您无权查看。",
    ),
    "rated_again": (
        "The answer was rated again while you were writing: read the rating below, and send your review again.",
        "在您填写期间，该回答收到了新的评分：请阅读下方的新评分，然后重新提交。",
    ),
    "no_correction": (
        "There is no correction: write one, or dismiss the answer.",
        "没有更正内容：请填写更正，或选择驳回。",
    ),
    "correction_too_long": ("The correction is too long: shorten it.", "更正太长：请缩短。"),
    "body_too_large": ("The form is too large: send less.", "表单太大：请减少内容。"),
    "no_journal": ("This host keeps no ratings.", "本主机不保存评分。"),
    "journal_unavailable": (
        "The journal of ratings cannot be used now: retry later.",
        "评分日志暂时不可用：请稍后重试。",
    ),
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
    """The text of that name; raises KeyError for an unknown name."""
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

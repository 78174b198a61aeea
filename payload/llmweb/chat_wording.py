"""What the chat page says, in English and in Chinese; other words are those of the operator page."""

WORDS: dict[str, tuple[str, str]] = {
    "site": ("Chat", "对话"),
    "sign_in_hint": (
        "Your API key. It opens a session, which ends with the key, after 30 idle minutes or 8 hours. The key is not kept.",
        "请输入您的 API 密钥。密钥换成本浏览器的会话；30 分钟未使用、满 8 小时或密钥失效，会话即结束。浏览器不保存密钥。",
    ),
    "provider": ("Sign in with your organisation’s account", "使用组织账号登录"),
    "back": ("To the chat", "返回对话"),
    "no_script": (
        "This page needs JavaScript: allow it for this site, or use the API.",
        "本页需要 JavaScript：请为本站启用，或使用 API。",
    ),
    "model": ("Model", "模型"),
    "new": ("New conversation", "新对话"),
    "conversations": ("Conversations in this browser", "本浏览器中的对话"),
    "where": (
        "They are stored in this browser alone, without your key, until you delete them.",
        "对话只保存在本浏览器中，不含密钥，直到您删除为止。",
    ),
    "system": ("System prompt", "系统提示词"),
    "system_used": ("(in use)", "（已设置）"),
    "system_hint": (
        "Instructions that the model reads before this conversation",
        "模型在本次对话之前读取的指令",
    ),
    "search": ("Search titles and texts", "搜索标题与内容"),
    "save_all": ("Save all as {format}", "全部保存为 {format}"),
    "delete": ("Delete", "删除"),
    "delete_all": ("Delete all conversations", "删除全部对话"),
    "kept_here": ("What this host keeps of you", "本主机保存的您的数据"),
    "kept_note": (
        "Ratings; questions and answers if your organisation keeps them. Not what other hosts, backups and training data have.",
        "包括评价；如您的组织保存，也包括您的问题与回答。不含其他主机、备份和训练数据中的内容。",
    ),
    "forget": ("Delete all of it", "全部删除"),
    "messages": ("Messages", "消息"),
    "question": ("Your question", "您的问题"),
    "question_hint": (
        "Enter sends, Shift and Enter begins a new line. Answers can be wrong: check what matters.",
        "按 Enter 发送，按 Shift+Enter 换行。回答可能有误：重要内容请核实。",
    ),
    "attach": ("Attach text files", "添加文本文件"),
    "remove": ("Remove", "移除"),
    "edit": ("Edit", "编辑"),
    "editing": (
        "You are editing an earlier question: what follows it is replaced once an answer to the new one comes.",
        "您正在编辑之前的问题：新的回答到来后，将取代其后的内容。",
    ),
    "cancel": ("Cancel", "取消"),
    "send": ("Send", "发送"),
    "stop": ("Stop", "停止"),
    "you": ("You", "您"),
    "answer": ("Answer", "回答"),
    "thoughts": ("How the model got there", "思考过程"),
    "copy": ("Copy", "复制"),
    "again": ("Regenerate", "重新生成"),
    "thumb_up": ("Good answer", "回答得好"),
    "thumb_down": ("Bad answer", "回答不好"),
    "correct": ("Correct it", "更正"),
    "reason": ("Reason", "原因"),
    "no_reason": ("None", "无"),
    "reason_wrong": ("It is wrong", "错误"),
    "reason_incomplete": ("It is incomplete", "不完整"),
    "reason_irrelevant": ("It is about something else", "答非所问"),
    "reason_harmful": ("It is harmful", "有害"),
    "reason_refused": ("It refused", "拒绝回答"),
    "reason_too_long": ("It is too long", "过长"),
    "reason_too_short": ("It is too short", "过短"),
    "reason_style": ("Its style", "文风"),
    "reason_other": ("Something else", "其他"),
    "comment": ("Comment", "意见"),
    "correction": ("What should have been answered", "应当这样回答"),
    "send_rating": ("Send the rating", "提交评价"),
}

# Of the script, which puts values into the braces.
SCRIPT: dict[str, tuple[str, str]] = {
    "of_model": ("Answer of {model}", "{model} 的回答"),
    "of_system": ("System prompt", "系统提示词"),
    "of_user": ("You", "您"),
    "answering": ("The answer is coming.", "正在回答。"),
    "waiting": (
        "The model is busy: the question is sent again in {seconds} s (retry {retry} of 2).",
        "模型繁忙：{seconds} 秒后自动重新发送（第 {retry} 次，共 2 次）。",
    ),
    "quota": (
        "Tokens left: {minute} this minute, {day} until {until}.",
        "剩余词元：本分钟 {minute}，{until} 之前 {day}。",
    ),
    "no_quota": ("How many tokens are left is not known at present.", "目前无法得知剩余词元数。"),
    "matches": ("Conversations found: {count} of {all}.", "找到 {count} 个对话，共 {all} 个。"),
    "save_named": ("Save “{title}” as {format}", "将“{title}”保存为 {format}"),
    "all_named": ("conversations", "全部对话"),
    "attached": ("Files attached: {count}.", "已添加文件：{count} 个。"),
    "detach": ("Remove “{name}”", "移除“{name}”"),
    "file_too_large": (
        "“{name}” has {size} bytes, and a request at most {most}: attach a part of it.",
        "“{name}”有 {size} 字节，而请求最多 {most} 字节：请只添加其中一部分。",
    ),
    "file_binary": (
        "“{name}” is not a text file in UTF-8: save it as one, or paste its text.",
        "“{name}”不是 UTF-8 文本文件：请转换后添加，或直接粘贴文本。",
    ),
    "file_unreadable": (
        "“{name}” cannot be read ({message}): choose it again.",
        "无法读取“{name}”（{message}）：请重新选择。",
    ),
    "answered": ("The answer is complete.", "回答完毕。"),
    "stopped": ("The answer was stopped.", "回答已停止。"),
    "cut": ("The answer reached the greatest length that you may ask for.", "回答已达到允许的最大长度。"),
    "broken": ("The answer broke off: regenerate it.", "回答中断：请重新生成。"),
    "source": ("[{number}] {name}, page {page}", "[{number}] {name}，第 {page} 页"),
    "unsupported": (
        "No passage that is cited has these words: {quotes}",
        "所引段落中没有以下文字：{quotes}",
    ),
    "copied": ("Copied.", "已复制。"),
    "uncopied": ("The browser does not let this page copy.", "浏览器不允许本页复制。"),
    "rated": ("Thank you. The rating is kept, without any text.", "谢谢。评价已保存，不含任何文本。"),
    "rated_kept": (
        "Thank you. The rating is kept, with comment and correction; your organisation keeps questions and answers, too.",
        "谢谢。评价已保存，包括意见和更正；您所在的组织也保存问题与回答。",
    ),
    "nothing_kept": ("No rating and no text of yours is kept here.", "此主机没有保存您的评分或文字。"),
    "kept_older": ("{count} older ones are not listed.", "另有 {count} 条较早的未列出。"),
    "kept_others": (
        "Records of experiments and reviews, which are not listed: {count}.",
        "另有实验与评审记录 {count} 条，未列出。",
    ),
    "kept_rating": ("{time}: rating {what}", "{time}：评价 {what}"),
    "kept_exchange": ("{time}: “{what}”", "{time}：“{what}”"),
    "really": (
        "Delete your ratings, and the questions and answers that are kept of you on this host? They cannot be restored.",
        "确定删除本主机保存的您的评价、问题与回答吗？删除后无法恢复。",
    ),
    "forgotten": ("Deleted: {removed}. Left: {left}.", "已删除：{removed}。剩余：{left}。"),
    "error_legal_hold": (
        "Nothing may be deleted at present: ask the operator.",
        "目前不允许删除：请联系运维人员。",
    ),
    "no_rating": (
        "There is nothing to send: rate the answer, or correct it.",
        "没有可提交的内容：请评价或更正。",
    ),
    "error_response_not_found": (
        "This answer was not given to you, or by another estate: it cannot be rated.",
        "该回答不是给您的，或来自其他系统：无法评价。",
    ),
    "error_response_expired": ("This answer is too old to be rated.", "该回答已过评价期限。"),
    "error_feedback_unavailable": (
        "The rating cannot be kept now: send it again later.",
        "目前无法保存评价：请稍后再提交。",
    ),
    "deleted": ("Deleted.", "已删除。"),
    "delete_named": ("Delete “{title}”", "删除“{title}”"),
    "unkept": (
        "This browser stores nothing for this page: the conversation is gone when the page is closed.",
        "本浏览器不为本页保存数据：关闭页面后对话将丢失。",
    ),
    "no_models": ("There is no model that you may use.", "没有您可以使用的模型。"),
    "failed": ("It failed: {message}", "失败：{message}"),
    "id": ("Request id: {id}", "请求编号：{id}"),
    "error_no_session": ("The session is over: sign in again.", "会话已结束：请重新登录。"),
    "error_csrf": ("The page is of another session: load it again.", "本页属于另一个会话：请刷新。"),
    "error_denied": ("The policy does not let you do this.", "策略不允许此操作。"),
    "error_rate_limited": (
        "You have used up what you may ask for at present: wait a moment.",
        "当前的用量额度已用完：请稍候。",
    ),
    "error_too_many_at_once": (
        "You have as many answers coming as are allowed: wait for one, or stop it.",
        "同时进行的请求已达上限：请等待其中一个完成，或将其停止。",
    ),
    "error_too_many_waiting": ("The model is busy: send it again later.", "模型繁忙：请稍后再发送。"),
    "error_context_length_exceeded": (
        "The conversation is longer than the model can read: begin a new one, or attach less.",
        "对话超出模型可读取的长度：请开始新对话，或减少附件。",
    ),
    "error_body_too_large": (
        "The conversation with its files has more bytes than a request may have: begin a new one, or attach less.",
        "对话连同文件超出请求允许的字节数：请开始新对话，或减少附件。",
    ),
    "error_unavailable": (
        "No answer can be given at present: send it again later.",
        "目前无法回答：请稍后再发送。",
    ),
    "error_network": (
        "The page cannot be reached: check the connection, and send it again.",
        "无法连接：请检查网络后重新发送。",
    ),
}

# Of refusals on this page, by code.
REFUSALS: dict[str, tuple[str, str]] = {
    "login_failed": ("The sign-in did not succeed: begin it again.", "登录未成功：请重新开始。"),
    "login_denied": ("Your organisation’s sign-in did not let you in.", "组织账号登录被拒绝。"),
    "provider_unavailable": (
        "Your organisation’s sign-in does not answer: use an API key, or try again later.",
        "组织账号登录服务无应答：请使用 API 密钥，或稍后再试。",
    ),
    "denied": (
        "The policy does not let you chat: ask for the role developer.",
        "策略不允许您使用对话：请申请 developer 角色。",
    ),
}

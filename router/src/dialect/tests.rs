//! What each dialect makes of what models write, and what must hold whatever they write.

use super::{exam::*, reasoning::*, *};
use proptest::prelude::*;

fn check(reading: &Reading, text: &str, expected: (&str, &str, &[(&str, &str)])) {
    let (reasoning, content, calls) = expected;
    let calls = calls.iter().map(|(name, json)| (name.to_string(), json.to_string())).collect();
    let expected = Said { reasoning: reasoning.into(), text: content.into(), calls };
    assert_eq!(heard(reading, &[text]), expected, "{text}");
    let each: Vec<String> = text.chars().map(String::from).collect();
    let each: Vec<&str> = each.iter().map(String::as_str).chain([""]).collect();
    assert_eq!(heard(reading, &each), expected, "{text}, character by character");
}

#[test]
fn hermes() {
    let reading = auto(ToolFormat::Hermes);
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| check(&reading, text, ("", content, calls));
    check("Hello, world!\n", "Hello, world!\n", &[]);
    check(
        "Let me see.\n<tool_call>\n{\"name\": \"weather\", \"arguments\": {\"city\": \"}<\\\"\", \"days\": [1, {}]}}\n</tool_call>\n\
         <tool_call>\n{\"arguments\": {}, \"name\": \"f\"}\n</tool_call>",
        "Let me see.",
        &[("weather", "{\"city\": \"}<\\\"\", \"days\": [1, {}]}"), ("f", "{}")],
    );
    check("<tool_call>{\"name\": \"f\"}</tool_call> and so on", "and so on", &[("f", "{}")]);
    check("<tool_call>{\"name\": \"f\", \"arguments\": null, \"id\": 7}</tool_call>", "", &[("f", "{}")]);
    check("<tool_call>{\"name\": \"f\", \"arguments\": \"{\\\"a\\\": 1}\"}</tool_call>", "", &[("f", "{\"a\": 1}")]);
    // Cut off by a limit: what came is shown.
    check("<tool_call>{\"name\": \"f\", \"arguments\": {\"a\": \"b", "", &[("f", "{\"a\": \"b")]);
    // No calls.
    check("a <tool_cal", "a <tool_cal", &[]);
    check("<tool_call>oops</tool_call>", "<tool_call>oops</tool_call>", &[]);
    check("<tool_call>{\"nome\": \"f\"}</tool_call>", "<tool_call>{\"nome\": \"f\"}</tool_call>", &[]);
    check("1 < 2 </tool_call>", "1 < 2 </tool_call>", &[]);
}

#[test]
fn llama3_json() {
    let reading = auto(ToolFormat::Llama3Json);
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| check(&reading, text, ("", content, calls));
    check("{\"name\": \"f\", \"parameters\": {\"a\": 1}}", "", &[("f", "{\"a\": 1}")]);
    check(
        "<|python_tag|>{\"name\": \"f\", \"parameters\": {}}; {\"name\": \"weather\", \"parameters\": {\"city\": \"x\"}}",
        "",
        &[("f", "{}"), ("weather", "{\"city\": \"x\"}")],
    );
    check("{\"name\": \"Bob\", \"age\": 3}", "{\"name\": \"Bob\", \"age\": 3}", &[]);
    check("It is {\"name\": \"f\"}", "It is {\"name\": \"f\"}", &[]);
    check("{\"name\": \"f\", \"parameters\": {}} Done.", "Done.", &[("f", "{}")]);
}

#[test]
fn mistral() {
    let reading = auto(ToolFormat::Mistral);
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| check(&reading, text, ("", content, calls));
    check(
        "[TOOL_CALLS] [{\"name\": \"f\", \"arguments\": {\"a\": 1}}, {\"name\": \"weather\", \"arguments\": {}}]",
        "",
        &[("f", "{\"a\": 1}"), ("weather", "{}")],
    );
    check("Ok.[TOOL_CALLS]f{\"a\": {}}[TOOL_CALLS]weather[ARGS]{}", "Ok.", &[("f", "{\"a\": {}}"), ("weather", "{}")]);
    check("[TOOL_CALLS]f[CALL_ID]123456789[ARGS]{}", "", &[("f", "{}")]);
    check("[TOOL_CALLS]\nf\n{}", "f\n{}", &[]);
    check("an [array]", "an [array]", &[]);
    let mut events = Vec::new();
    Listener::new(&reading).hear("[TOOL_CALLS]f{}".into(), true, &mut events);
    let Some(Event::Call { id, .. }) = events.first() else { panic!("{events:?}") };
    assert!(id.len() == 9 && id.chars().all(|c| c.is_ascii_alphanumeric()), "{id}");
}

#[test]
fn pythonic() {
    let reading = auto(ToolFormat::Pythonic);
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| check(&reading, text, ("", content, calls));
    check(
        "[weather(city='San (Francisco)', days=3, where={'a': [True, None]}), f()]",
        "",
        &[("weather", r#"{"city": "San (Francisco)", "days": 3, "where": {"a":[true,null]}}"#), ("f", "{}")],
    );
    check("<|python_start|>[f(a = 1,)]<|python_end|>", "", &[("f", "{\"a\": 1}")]);
    check("[link](http://x)", "[link](http://x)", &[]);
    check("[g(a=1)]", "[g(a=1)]", &[]);
    check("[1, 2]", "[1, 2]", &[]);
    // What goes wrong within a call leaves it open, so that nobody mistakes it for the whole.
    check("[f(a=1, b=oops)]", "b=oops)]", &[("f", "{\"a\": 1")]);
    check("[f(a=1, b='x", "", &[("f", "{\"a\": 1")]);
}

#[test]
fn qwen3_xml() {
    let reading = auto(ToolFormat::Qwen3Xml);
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| check(&reading, text, ("", content, calls));
    check(
        "Now.\n<tool_call>\n<function=weather>\n<parameter=city>\n<b>Paris</b>\n\n</parameter>\n<parameter=days>\n3\n</parameter>\n\
         <parameter=where>{'x': 1}</parameter><parameter=hot>False</parameter>\n</function>\n</tool_call>",
        "Now.",
        &[("weather", r#"{"city": "<b>Paris</b>\n", "days": 3, "where": {"x":1}, "hot": false}"#)],
    );
    check("<function=f></function><function=f><parameter=a>1</function>", "", &[("f", "{}"), ("f", "{\"a\": \"1\"}")]);
    check("<function=\n>", "<function=\n>", &[]);
    check("<function=f><parameter=a>1", "", &[("f", "{")]);
}

#[test]
fn cohere() {
    let reading = auto(ToolFormat::Cohere);
    let check = |text: &str, content: &str, calls: &[(&str, &str)]| check(&reading, text, ("", content, calls));
    check(
        "<|START_ACTION|>[\n {\"tool_call_id\": \"0\", \"tool_name\": \"f\", \"parameters\": {\"a\": 1}}\n]<|END_ACTION|>",
        "",
        &[("f", "{\"a\": 1}")],
    );
    check("<|START_RESPONSE|>Hi ```x```<|END_RESPONSE|>", "Hi ```x```", &[]);
    check("Action: ```json\n[{\"tool_name\": \"f\", \"parameters\": {}}]\n```", "", &[("f", "{}")]);
}

#[test]
fn forced_calls() {
    let required = Reading { tools: Use::Required, ..Reading::default() };
    check(
        &required,
        "[{\"name\": \"f\", \"parameters\": {\"a\": 1}}, {\"name\": \"f\", \"parameters\": {}}]",
        ("", "", &[("f", "{\"a\": 1}"), ("f", "{}")]),
    );
    check(&required, "[{\"name\": \"f\", \"parameters\": {\"a\"", ("", "", &[("f", "{\"a\"")]));
    let named = Reading { tools: Use::Named("f".into()), ..Reading::default() };
    check(&named, " {\"a\": [1, 2]}\n", ("", "", &[("f", "{\"a\": [1, 2]}")]));
    let one = Reading { one_call: true, ..required };
    check(
        &one,
        "[{\"name\": \"f\", \"parameters\": {}}, {\"name\": \"f\", \"parameters\": {}}]",
        ("", "", &[("f", "{}")]),
    );
}

#[test]
fn thoughts_are_told_from_the_rest() {
    let reading = |thoughts, opening| Reading { thoughts: Some(thoughts), opening, ..auto(ToolFormat::Hermes) };
    let qwen = reading(&QWEN3, Opening::May);
    check(&qwen, "<think>\nHm. <b> 1 < 2\n</think>\n\nHello\n", ("Hm. <b> 1 < 2", "Hello\n", &[]));
    check(&qwen, "Hello </think>", ("", "Hello </think>", &[]));
    check(&qwen, " <thin", ("", " <thin", &[]));
    check(&qwen, "<think>a</think><tool_call>{\"name\": \"f\"}</tool_call>", ("a", "", &[("f", "{}")]));
    check(&qwen, "<think><tool_call>{}", ("<tool_call>{}", "", &[]));
    let thinking = reading(&DEEPSEEK_R1, Opening::Thinking);
    check(&thinking, "Hm.\n</think>\nHello", ("Hm.", "Hello", &[]));
    check(&thinking, "<think>Hm.</think>Hello", ("Hm.", "Hello", &[]));
    check(&thinking, "</think>Hello", ("", "Hello", &[]));
    check(&thinking, "Hm. </thi", ("Hm. </thi", "", &[]));
    check(&reading(&QWEN3, Opening::Speaking), "<think>x", ("", "<think>x", &[]));
    let hidden = Reading { hide_thoughts: true, ..thinking };
    check(&hidden, "Hm.</think>Hello", ("", "Hello", &[]));
}

#[test]
fn prompts_say_whether_a_model_thinks() {
    let check =
        |thoughts: &Thoughts, prompt: &str, expected| assert_eq!(thoughts.opening(prompt), expected, "{prompt}");
    check(&QWEN3, "<|im_start|>assistant\n", Opening::May);
    check(&QWEN3, "<|im_start|>assistant\n<think>\n", Opening::Thinking);
    check(&QWEN3, "<|im_start|>assistant\n<think>\n\n</think>\n\n", Opening::Speaking);
    check(&DEEPSEEK_R1, "<｜Assistant｜>", Opening::Thinking);
    check(&DEEPSEEK_R1, "<｜Assistant｜></think>", Opening::Speaking);
}

#[test]
fn tokens_of_thoughts_are_counted_without_their_marks() {
    let covered = |opening, tokens: &[u32]| {
        let mut span = Span::new(Some(1), Some(2), opening);
        tokens.iter().filter(|token| span.covers(**token)).count()
    };
    assert_eq!(covered(Opening::May, &[1, 7, 7, 2, 7, 1, 7]), 2);
    assert_eq!(covered(Opening::Thinking, &[7, 7, 2, 7]), 2);
    assert_eq!(covered(Opening::Speaking, &[1, 7, 2]), 0);
}

/// Text made of what parsers look for, and of what they do not expect.
fn hostile() -> impl Strategy<Value = String> {
    let words = vec![
        "<tool_call>",
        "</tool_call>",
        "<function=",
        "<parameter=",
        "</parameter>",
        "</function>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "<|python_tag|>",
        "<|python_start|>",
        "<|START_ACTION|>",
        "<|END_ACTION|>",
        "Action: ```json",
        "```",
        "<think>",
        "</think>",
        "{",
        "}",
        "[",
        "]",
        "(",
        ")",
        "=",
        ":",
        ",",
        ";",
        "\"",
        "'",
        "\\",
        "\n",
        " ",
        ">",
        "f",
        "weather",
        "\"name\": ",
        "\"f\"",
        "\"arguments\": ",
        "\"parameters\": ",
        "{\"name\": \"f\", \"arguments\": {",
        "f(a=",
        "1",
        "null",
        "é",
        "\u{0}",
        "🙂",
    ];
    prop::collection::vec(
        prop_oneof![8 => prop::sample::select(words).prop_map(String::from), 1 => any::<String>()],
        0..40,
    )
    .prop_map(|words| words.concat())
}

proptest! {
    #[test]
    fn any_split_says_the_same(text in hostile(), cuts in prop::collection::vec(any::<prop::sample::Index>(), 0..12)) {
        let mut cuts: Vec<usize> = cuts.iter().map(|cut| cut.index(text.len() + 1)).map(|at| text.floor_char_boundary(at)).collect();
        cuts.extend([0, text.len()]);
        cuts.sort_unstable();
        let pieces: Vec<&str> = cuts.windows(2).map(|two| &text[two[0]..two[1]]).collect();
        examine(&pieces);
    }
}

//! Lines as people have them.

use super::super::*;
use super::says;

fn supervised(line: &str) -> Record {
    Record::supervised(line).expect(line)
}

fn refused(line: &str) -> String {
    Record::supervised(line).expect_err(line).to_string()
}

fn pair(prompt: &str, response: &str) -> Record {
    Record::Pair {
        prompt: prompt.into(),
        response: response.into(),
    }
}

#[test]
fn pairs_are_known_by_their_keys() {
    let expected = pair("p", "r");
    for line in [
        r#"{"prompt": "p", "response": "r"}"#,
        r#"{"prompt": "p", "completion": "r", "id": 3}"#,
        r#"{"instruction": "p", "output": "r"}"#,
        r#"{"instruction": "p", "input": "", "output": "r"}"#,
        r#"{"instruction": "p", "input": null, "output": "r", "response": null}"#,
        r#"{"prompt": "p", "input": "not an instruction's", "response": "r"}"#,
    ] {
        assert_eq!(supervised(line), expected, "{line}");
    }
    assert_eq!(
        supervised(
            r#"{"instruction": "Translate.\n", "input": "Guten Tag", "output": "Good day"}"#
        ),
        pair("Translate.\n\nGuten Tag", "Good day")
    );
    assert_eq!(
        supervised(r#"{"prompt": "", "response": " r\n"}"#),
        pair("", " r\n")
    );
}

#[test]
fn conversations_are_known_by_their_keys() {
    let turns = vec![
        says(Role::System, "s"),
        says(Role::User, "u"),
        says(Role::Assistant, "a"),
        says(Role::Tool, ""),
    ];
    let expected = Record::Conversation(turns);
    for line in [
        r#"{"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
            {"role": "assistant", "content": "a", "weight": 1, "tool_calls": null}, {"role": "tool", "content": ""}]}"#,
        r#"{"conversations": [{"from": "system", "value": "s"}, {"from": "human", "value": "u"},
            {"from": "gpt", "value": "a"}, {"from": "tool", "value": ""}]}"#,
        r#"{"system": "s", "tools": [], "prompt": "u", "conversations": [{"role": "user", "content": "u"},
            {"role": "assistant", "content": "a"}, {"from": "tool", "value": ""}]}"#,
    ] {
        assert_eq!(supervised(line), expected, "{line}");
    }
}

#[test]
fn lines_without_a_clear_shape_are_refused() {
    assert_eq!(
        refused(r#"{"text": "t", "response": null}"#),
        "has the keys `response` (null), `text`; a line needs `messages` or `conversations` (a list of turns), or \
         `prompt` or `instruction` (perhaps with `input`) and with it `response`, `completion` or `output`"
    );
    assert!(refused("{}").starts_with("has the keys none; "));
    assert!(refused(r#"{"prompt": "p"}"#).starts_with("has the keys `prompt`; "));
    assert_eq!(
        refused(r#"{"messages": [], "prompt": "p", "response": "r"}"#),
        "has both `messages` and `response`, so it is not clear which one is meant; leave one out"
    );
    assert_eq!(
        refused(r#"{"prompt": "p", "instruction": "i", "response": "r"}"#),
        "has both `prompt` and `instruction`, so it is not clear which one is meant; leave one out"
    );
    assert!(
        refused(r#"{"messages": [], "conversations": []}"#)
            .contains("`messages` and `conversations`")
    );
    assert_eq!(refused("[1]"), "is a list, not a JSON object");
    assert!(refused("{\"prompt\"").starts_with("is not valid JSON: EOF"));
}

#[test]
fn values_of_the_wrong_type_are_named() {
    assert_eq!(
        refused(r#"{"prompt": ["p"], "response": "r"}"#),
        "has a list as `prompt`, where a string belongs"
    );
    assert_eq!(
        refused(r#"{"instruction": "p", "input": 5, "output": "r"}"#),
        "has a number as `input`, where a string belongs"
    );
    assert_eq!(
        refused(r#"{"messages": "hello"}"#),
        "has a string as `messages`, where a list of turns belongs"
    );
    assert_eq!(
        refused(r#"{"messages": [{"role": "user", "content": "u"}, "a"]}"#),
        "has a string as `messages[1]`, where an object with `role` and `content`, or with `from` and `value` belongs"
    );
    assert_eq!(
        refused(r#"{"messages": [{"role": "user", "content": [{"type": "text"}]}]}"#),
        "has a list as `messages[0].content`, where a string belongs"
    );
    assert_eq!(
        refused(r#"{"messages": [{"role": "user", "text": "u"}]}"#),
        "has no `messages[0].content` or `value`; its keys are `role`, `text`"
    );
}

#[test]
fn lines_with_nothing_to_learn_are_refused() {
    assert_eq!(
        refused(r#"{"prompt": "p", "response": " \n"}"#),
        "has a blank `response`, so there is nothing to learn from it"
    );
    assert_eq!(
        refused(
            r#"{"conversations": [{"from": "human", "value": "u"}, {"from": "gpt", "value": ""}]}"#
        ),
        "has a blank `conversations[1].value`, so there is nothing to learn from it"
    );
    assert_eq!(
        refused(r#"{"messages": [{"role": "user", "content": "u"}]}"#),
        "has no turn of `assistant` or `gpt` in `messages`, so there is nothing to learn from it"
    );
}

#[test]
fn what_is_not_understood_is_refused_by_name() {
    assert_eq!(
        refused(r#"{"messages": [{"role": "narrator", "content": "u"}]}"#),
        "has `narrator` as `messages[0].role`; a turn is one of system, user (or human), assistant (or gpt), tool"
    );
    assert_eq!(
        refused(r#"{"messages": [{"role": "assistant", "content": "a", "weight": 0}]}"#),
        "has `messages[0].weight`, which is not supported; every turn of the assistant is trained alike"
    );
    assert!(
        refused(r#"{"messages": [{"role": "assistant", "content": null, "tool_calls": [{}]}]}"#)
            .starts_with("has `messages[0].tool_calls`, which is not supported; ")
    );
    assert!(
        refused(r#"{"tools": [{}], "messages": [{"role": "assistant", "content": "a"}]}"#)
            .starts_with("has `tools`, which is not supported; ")
    );
}

#[test]
fn labelled_texts_are_found_or_named() {
    let labelled = |text: &str, label: &str| Record::Labelled {
        text: text.into(),
        label: label.into(),
    };
    for (line, label) in [
        (r#"{"text": "t", "label": "spam"}"#, "spam"),
        (r#"{"sentence": "t", "labels": -1}"#, "-1"),
        (r#"{"message": "t", "category": true}"#, "true"),
        (r#"{"content": "t", "class": 12, "id": "x"}"#, "12"),
    ] {
        let found = Record::labelled(line, None, None);
        assert_eq!(found, Ok(labelled("t", label)), "{line}");
    }
    let both = r#"{"text": "t", "message": "m", "label": 1, "intent": "i"}"#;
    let refused = |line: &str, text, label| {
        let found = Record::labelled(line, text, label);
        found.expect_err(line).to_string()
    };
    assert_eq!(
        Record::labelled(both, Some("message"), Some("intent")),
        Ok(labelled("m", "i"))
    );
    assert_eq!(
        refused(both, None, None),
        "has both `text` and `message`, so it is not clear which one is meant; leave one out"
    );
    assert_eq!(
        refused(r#"{"body": "t", "label": 1}"#, None, None),
        "has no `text`, `sentence`, `message`, `content`; its keys are `body`, `label`"
    );
    assert_eq!(
        refused(r#"{"text": "t", "label": 0.5}"#, None, None),
        "has a number as `label`, where a string, a whole number, true or false belongs"
    );
    assert_eq!(
        refused(r#"{"text": "t", "label": ["a"]}"#, None, None),
        "has a list as `label`, where a string, a whole number, true or false belongs"
    );
    assert_eq!(
        refused(r#"{"text": "\t", "label": 1}"#, None, None),
        "has a blank `text`, so there is nothing to learn from it"
    );
}

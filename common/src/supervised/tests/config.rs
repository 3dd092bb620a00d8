//! What a `tokenizer_config.json` says of conversations.

use super::super::*;

#[test]
fn a_template_is_a_text_or_the_default_one_of_a_list() {
    let template = |json: &str| chat_template_of(json).expect("readable");
    assert_eq!(template("{}"), None);
    assert_eq!(template(r#"{"chat_template": null}"#), None);
    assert_eq!(template(r#"{"chat_template": []}"#), None);
    assert_eq!(
        template(r#"{"chat_template": "{{ x }}"}"#).as_deref(),
        Some("{{ x }}")
    );
    let several = r#"{"chat_template": [{"name": "tool_use", "template": "t"}, {"name": "default", "template": "d"}]}"#;
    assert_eq!(template(several).as_deref(), Some("d"));
}

#[test]
fn templates_that_cannot_be_understood_are_named() {
    let error = |json: &str| chat_template_of(json).expect_err("refused").to_string();
    assert_eq!(
        error(r#"{"chat_template": [{"name": "rag", "template": "r"}]}"#),
        "`chat_template` has no template named `default`; it has `rag`"
    );
    assert_eq!(
        error(r#"{"chat_template": 7}"#),
        "`chat_template` is `7`; expected a template, or a list of templates with `name` and `template`"
    );
    assert_eq!(error("[]"), "not a JSON object");
    assert_eq!(error("{"), "not valid JSON");
}

#[test]
fn special_tokens_are_texts_or_objects() {
    let json = r#"{"bos_token": null, "eos_token": {"content": "</s>", "lstrip": false}, "pad_token": "<pad>"}"#;
    let expected = SpecialTexts {
        eos: Some("</s>".into()),
        pad: Some("<pad>".into()),
        ..SpecialTexts::default()
    };
    assert_eq!(special_texts(json).expect("readable"), expected);
    let error = special_texts(r#"{"eos_token": 2}"#).expect_err("refused");
    assert_eq!(
        error.to_string(),
        "`eos_token` is `2`; expected a text, or an object with `content`"
    );
}

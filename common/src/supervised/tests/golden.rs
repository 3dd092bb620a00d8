//! Templates, compared with what `transformers` renders. `common/golden/chat_templates.py` made the texts.

use serde::Deserialize;

use super::super::*;

#[derive(Deserialize)]
struct Case {
    messages: Vec<Turn>,
    /// `None` where the template raises an exception.
    whole: Option<String>,
    prompt: Option<String>,
}

#[derive(Deserialize)]
struct Turn {
    role: String,
    content: String,
}

#[derive(Deserialize)]
struct Golden {
    name: String,
    template: String,
    specials: serde_json::Value,
    cases: Vec<Case>,
}

/// A template of the golden file, with its conversations.
pub(super) struct Known {
    pub name: String,
    pub template: ChatTemplate,
    pub conversations: Vec<Vec<Message>>,
    expected: Vec<[Option<String>; 2]>,
}

/// All templates of the golden file.
pub(super) fn known() -> Vec<Known> {
    let golden: Vec<Golden> =
        serde_json::from_str(include_str!("../../../golden/chat_templates.json"))
            .expect("the golden file is JSON");
    golden.into_iter().map(of_golden).collect()
}

fn of_golden(golden: Golden) -> Known {
    let specials = special_texts(&golden.specials.to_string()).expect("texts");
    let message = |turn: &Turn| {
        let role = match turn.role.as_str() {
            "system" => Role::System,
            "user" => Role::User,
            "assistant" => Role::Assistant,
            "tool" => Role::Tool,
            other => panic!("unexpected role {other}"),
        };
        super::says(role, &turn.content)
    };
    Known {
        template: ChatTemplate::parse(&golden.template, &specials).expect(&golden.name),
        name: golden.name,
        conversations: golden
            .cases
            .iter()
            .map(|case| case.messages.iter().map(message).collect())
            .collect(),
        expected: golden
            .cases
            .into_iter()
            .map(|case| [case.whole, case.prompt])
            .collect(),
    }
}

#[test]
fn every_template_renders_what_transformers_renders() {
    let mut rendered = 0;
    for known in known() {
        for (messages, expected) in known.conversations.iter().zip(&known.expected) {
            for (add_generation_prompt, expected) in [false, true].into_iter().zip(expected) {
                let found = known.template.render(messages, add_generation_prompt);
                match expected {
                    Some(expected) => assert_eq!(found.as_ref(), Ok(expected), "{}", known.name),
                    None => assert!(
                        matches!(found, Err(TemplateError::Refused(_))),
                        "{}: {found:?}",
                        known.name
                    ),
                }
                rendered += 1;
            }
        }
    }
    assert_eq!(rendered, 7 * 7 * 2);
}

#[test]
fn what_ends_a_turn_is_found() {
    let ends: Vec<_> = known()
        .iter()
        .filter(|known| known.name != "methods")
        .map(|known| known.template.end_of_turn().unwrap_or_default())
        .collect();
    assert_eq!(
        ends,
        [
            "<|endoftext|>",
            "</s>",
            "<|im_end|>",
            "<|eot_id|>",
            "</s>",
            "<|im_end|>"
        ]
    );
}

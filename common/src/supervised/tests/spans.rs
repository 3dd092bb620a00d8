//! Which text is trained.

use proptest::prelude::*;

use super::super::*;
use super::golden::{Known, known};
use super::says;

fn trained(spans: &[Span]) -> Vec<&str> {
    let trained = spans.iter().filter(|span| span.trained);
    trained.map(|span| span.text.as_str()).collect()
}

fn joined(spans: &[Span]) -> String {
    spans.iter().map(|span| span.text.as_str()).collect()
}

fn template(name: &str) -> ChatTemplate {
    let named = known().into_iter().find(|known| known.name == name);
    named.expect("a known template").template
}

/// A conversation of two answers.
fn two_answers() -> Vec<Message> {
    vec![
        says(Role::User, "What is 2 + 2?"),
        says(Role::Assistant, "4"),
        says(Role::User, "And 3 + 3?"),
        says(Role::Assistant, " 6\n"),
        says(Role::User, "Thanks."),
    ]
}

#[test]
fn exactly_the_answers_and_their_ends_are_trained() {
    for (name, expected) in [
        ("default", ["4<|endoftext|>", " 6\n<|endoftext|>"]),
        ("chatml", ["4<|im_end|>", " 6\n<|im_end|>"]),
        ("smollm2", ["4<|im_end|>", " 6\n<|im_end|>"]),
        ("llama3", ["4<|eot_id|>", "6<|eot_id|>"]),
        ("mistral", [" 4</s>", " 6</s>"]),
    ] {
        let spans = template(name).spans(&two_answers()).expect(name);
        assert_eq!(trained(&spans), expected, "{name}");
    }
}

#[test]
fn our_template_reads_as_lines() {
    let spans = template("default")
        .spans(&two_answers()[..3])
        .expect("spans");
    let spans: Vec<_> = spans.iter().map(|s| (s.text.as_str(), s.trained)).collect();
    assert_eq!(
        spans,
        [
            ("User:\nWhat is 2 + 2?\nAssistant:\n", false),
            ("4<|endoftext|>", true),
            ("\nUser:\nAnd 3 + 3?\n", false),
        ]
    );
}

#[test]
fn the_spans_of_known_templates_are_the_whole_text() {
    for Known {
        name,
        template,
        conversations,
        ..
    } in known()
    {
        for messages in &conversations {
            match template.spans(messages) {
                Ok(spans) => {
                    assert_eq!(
                        Ok(joined(&spans)),
                        template.render(messages, false),
                        "{name}"
                    );
                    let answers = messages.iter().filter(|m| m.role == Role::Assistant);
                    assert_eq!(trained(&spans).len(), answers.count(), "{name}");
                }
                Err(_) if name == "methods" => {} // it is no format of a conversation
                Err(TemplateError::Refused(_)) => assert_eq!(name, "mistral"),
                // It says something only once there is a turn, so nothing comes before a first turn of the assistant.
                Err(TemplateError::NotAPrefix { index: 0, .. }) => assert_eq!(name, "smollm2"),
                Err(error) => panic!("{name}: {error}"),
            }
        }
    }
}

#[test]
fn templates_that_change_earlier_text_are_refused() {
    let refused = |source: &str, messages: &[Message]| {
        let template = ChatTemplate::parse(source, &SpecialTexts::default()).expect("parses");
        template.spans(messages).expect_err("refused").to_string()
    };
    let forgets = "{% for m in messages %}{{ m.role }}: \
        {{ m.content.split('</think>')[-1] if not loop.last else m.content }}\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    let thoughts = [
        says(Role::User, "u"),
        says(Role::Assistant, "<think>t</think>a"),
        says(Role::User, "u"),
    ];
    assert_eq!(
        refused(forgets, &thoughts),
        "the chat template renders turn 2 (assistant) differently once more turns follow (some templates take \
         reasoning out of earlier turns); take another template, or end the conversation there"
    );
    let counts = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}";
    assert_eq!(
        refused(counts, &thoughts),
        "the chat template renders what comes before turn 2 (assistant) differently once that turn is there, so what \
         the model will have seen before it is not known; take another template, or leave such conversations out"
    );
    let shouts = "{% for m in messages %}{{ m.content | upper }}{% endfor %}";
    assert_eq!(
        refused(shouts, &thoughts),
        "the chat template does not render the content of turn 2 (assistant) as it is, so that turn cannot be \
         trained; take another template, or leave such conversations out"
    );
}

#[test]
fn a_prompt_is_cut_as_training_cuts_it() {
    let template = template("chatml");
    let spans = template.prompt(&two_answers()).expect("a prompt");
    assert_eq!(Ok(joined(&spans)), template.render(&two_answers(), true));
    assert_eq!(trained(&spans), ["4<|im_end|>", " 6\n<|im_end|>"]);

    let counts = "{{ messages | length }}{% for m in messages %}{{ m.content }}{% endfor %}";
    let counts = ChatTemplate::parse(counts, &SpecialTexts::default()).expect("parses");
    let spans = counts.prompt(&two_answers()[..3]).expect("a prompt");
    assert_eq!(
        (spans.len(), joined(&spans).as_str()),
        (1, "3What is 2 + 2?4And 3 + 3?")
    );
}

#[test]
fn whitespace_that_ends_a_turn_is_trained_where_nothing_else_does() {
    let source = "{% for m in messages %}{{ m.role }}: {{ m.content }}\n\n{% endfor %}\
        {% if add_generation_prompt %}assistant: {% endif %}";
    let template = ChatTemplate::parse(source, &SpecialTexts::default()).expect("parses");
    assert_eq!(template.end_of_turn(), None);
    let spans = template.spans(&two_answers()[..2]).expect("spans");
    assert_eq!(trained(&spans), ["4\n\n"]);
}

#[test]
fn a_pair_is_parted_by_whitespace() {
    let texts = |prompt, response| {
        let spans = pair_spans(prompt, response, "<end>");
        let texts = spans.into_iter().map(|span| (span.text, span.trained));
        texts.collect::<Vec<_>>()
    };
    assert_eq!(
        texts("2 + 2?", "4"),
        [
            ("2 + 2?\n".to_string(), false),
            ("4<end>".to_string(), true)
        ]
    );
    for prompt in ["Q: 2 + 2? A: ", "2 + 2?\n\n", "2\t"] {
        assert_eq!(texts(prompt, "4")[0], (prompt.to_string(), false));
    }
    assert_eq!(texts("", "4"), [("4<end>".to_string(), true)]);
}

/// Anything that people and markup may say.
fn content() -> impl Strategy<Value = String> {
    prop_oneof!["[ -~]{1,20}", "[a-z{}%<|>\n \t'\"\\\\]{1,12}", "\\PC{1,12}"]
        .prop_filter("says something", |text| !text.trim().is_empty())
}

/// Turns as templates that insist on taking turns want them.
fn conversation() -> impl Strategy<Value = Vec<Message>> {
    let turns = prop::collection::vec((content(), content()), 1..4);
    (prop::option::of(content()), turns, any::<bool>()).prop_map(|(system, turns, open)| {
        let mut messages: Vec<_> = system.iter().map(|s| says(Role::System, s)).collect();
        for (question, answer) in turns {
            messages.push(says(Role::User, &question));
            messages.push(says(Role::Assistant, &answer));
        }
        if open {
            messages.pop();
            messages.push(says(Role::Assistant, "the last"));
            messages.push(says(Role::User, "an open question"));
        }
        messages
    })
}

proptest! {
    #![proptest_config(ProptestConfig::with_cases(128))]

    #[test]
    fn spans_are_the_whole_text_and_every_answer_is_in_its_own(messages in conversation()) {
        for known in known().into_iter().filter(|known| known.name != "methods") {
            let spans = known.template.spans(&messages).expect("spans");
            prop_assert_eq!(joined(&spans), known.template.render(&messages, false).expect("text"));
            prop_assert!(spans.iter().all(|span| !span.text.is_empty()));
            let answers = messages.iter().filter(|m| m.role == Role::Assistant);
            let answers: Vec<_> = answers.map(|m| m.content.trim()).collect();
            let trained = trained(&spans);
            prop_assert_eq!(trained.len(), answers.len());
            let end = known.template.end_of_turn().expect("a mark");
            for (trained, answer) in trained.iter().zip(answers) {
                prop_assert!(trained.contains(answer) && trained.ends_with(&end), "{:?}", trained);
            }
        }
    }
}

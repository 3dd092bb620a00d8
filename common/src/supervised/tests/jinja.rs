//! What `transformers` adds to Jinja.

use super::super::*;
use super::says;

fn parse(source: &str) -> Result<ChatTemplate, TemplateError> {
    ChatTemplate::parse(source, &SpecialTexts::default())
}

fn render(source: &str) -> Result<String, TemplateError> {
    parse(source)?.render(&[says(Role::User, "hi")], true)
}

#[test]
fn the_date_is_the_same_on_any_day() {
    // datetime.datetime(2024, 7, 26).strftime("%d %b %Y|%A %-d %B %y %j|%a %F %T %H:%M %%")
    let source = "{{ strftime_now('%d %b %Y|%A %-d %B %y %j|%a %F %T %H:%M %%') }}";
    let expected = "26 Jul 2024|Friday 26 July 24 208|Fri 2024-07-26 00:00:00 00:00 %";
    assert_eq!(render(source).as_deref(), Ok(expected));
    assert_eq!(
        render("a\n{{ strftime_now('%Q') }}")
            .expect_err("unknown")
            .to_string(),
        "the chat template cannot render the conversation: invalid operation: `strftime_now` does not know `%Q` \
         (line 2 of the template)"
    );
}

#[test]
fn a_raised_exception_is_what_the_template_says() {
    let error = render("{{ raise_exception('Only one turn, please.') }}").expect_err("raised");
    assert_eq!(
        error.to_string(),
        "the chat template refuses the conversation: Only one turn, please."
    );
}

#[test]
fn a_template_that_is_no_jinja_is_refused_with_its_line() {
    let error = parse("{% for m in messages %}\n{{ m.content }").expect_err("not Jinja");
    assert_eq!(
        error.to_string(),
        "the chat template does not parse: syntax error: unexpected `}`, expected end of variable block \
         (line 2 of the template)"
    );
}

#[test]
fn special_tokens_that_are_not_there_are_undefined() {
    let specials = SpecialTexts {
        bos: Some("<s>".into()),
        ..SpecialTexts::default()
    };
    let source = "{{ bos_token }}{{ eos_token }}{{ eos_token is defined }}{{ tools is none }}";
    let template = ChatTemplate::parse(source, &specials).expect("parses");
    assert_eq!(template.render(&[], false).as_deref(), Ok("<s>FalseTrue"));
    assert_eq!(template.source(), source);
}

#[test]
fn generation_blocks_render_their_content() {
    let source = "{%- generation -%} a {%- endgeneration -%} b{% generation %} c{% endgeneration %}{{ '{%' }} d";
    assert_eq!(render(source).as_deref(), Ok("ab c{% d"));
    assert_eq!(
        render("no end {{ 1 }} {# %} #}").as_deref(),
        Ok("no end 1 ")
    );
}

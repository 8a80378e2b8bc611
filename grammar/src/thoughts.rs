//! Reasoning before an answer: anything goes until the mark that ends it, and the grammar holds behind that.
//!
//! Where the mark is a token of its own, reasoning is counted and ended in tokens, whatever their bytes; where it is spelled in
//! several, it is text up to the mark. It must end: no grammar accepts half a thought.

use crate::{Thoughts, TokenTable, ebnf};
use llguidance::api::{GrammarWithLexer, TopLevelGrammar};
use std::fmt::Write;

/// Blanks between the mark and the answer: as many as models write there.
const BETWEEN: &str = r"/[\n ]{0,2}/";

/// Puts reasoning before `answer`.
pub(crate) fn before(
    answer: TopLevelGrammar,
    thoughts: &Thoughts,
    table: &TokenTable,
) -> Result<TopLevelGrammar, String> {
    let mut grammars = answer.grammars;
    let first = grammars.first_mut().ok_or("there is no grammar")?;
    first.name = Some("answer".into());
    let mut lark = String::new();
    let reasoning = match table.token(thoughts.end.as_bytes()) {
        Some(end) => {
            let others: Vec<String> = table.eos().iter().chain([&end]).map(ToString::to_string).collect();
            writeln!(lark, "thought: <[^{}]>", others.join(",")).expect("strings take all");
            match thoughts.budget {
                None => format!("thought* <[{end}]>"),
                Some(0) => format!("<[{end}]>"),
                Some(most) => format!("thought{{0,{most}}} <[{end}]>"),
            }
        }
        None if thoughts.budget.is_some() => {
            return Err(format!("a budget of tokens needs a model to which {:?} is one token", thoughts.end));
        }
        None => {
            writeln!(lark, "thought[suffix={}]: /(?s:.*)/", ebnf::quote(&thoughts.end)).expect("strings take all");
            "thought".to_owned()
        }
    };
    let reasoned = format!("{reasoning} between @answer");
    let start = match (thoughts.begun, table.token(thoughts.start.as_bytes())) {
        (true, _) => reasoned,
        (false, Some(start)) => format!("@answer | <[{start}]> {reasoned}"),
        (false, None) => format!("@answer | {} {reasoned}", ebnf::quote(&thoughts.start)),
    };
    writeln!(lark, "between: {BETWEEN}\nstart: {start}").expect("strings take all");
    grammars.insert(0, GrammarWithLexer::from_lark(lark));
    Ok(TopLevelGrammar { grammars, max_tokens: answer.max_tokens })
}

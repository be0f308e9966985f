//! Every place in the code that peers' bytes reach which could panic is listed in
//! `panic_sites.toml`, with the reason why it cannot.
//!
//! The files that `panic_sites.toml` names are parsed, without their tests and without what is
//! computed at compile time. These are sites:
//!
//! - macros: `panic!`, `unreachable!`, `todo!`, `unimplemented!`, `assert!` and its kin (but not
//!   `debug_assert!`);
//! - `unwrap`, `expect` and their `_err` forms;
//! - `index`: `a[i]` and `a[i..j]`, whatever `i` is: the types that make `array[0]` safe are not
//!   known here;
//! - the calls of [`PANICKING_CALLS`], and those of [`PANICKING_UNLESS_LITERAL`] with an argument
//!   that is not a literal;
//! - `divide`: `/` and `%` by anything but a literal or a constant;
//! - in the files under `arithmetic` also `subtract` and `multiply`, unless one side is a literal
//!   or a constant (for `-`: unless both are).
//!
//! Not covered: additions, shifts, `as`, arithmetic outside of the `arithmetic` files (release
//! builds wrap it), `insert` (which maps have, too), allocation failure, stack depth, and what
//! dependencies do.
//!
//! `RINGTUN_PANIC_SITES=print cargo test --test panic_sites -- --nocapture` prints the entries that
//! are missing.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::fs;
use std::path::{Path, PathBuf};

use proc_macro2::{TokenStream, TokenTree};
use serde::Deserialize;
use syn::parse::Parser;
use syn::punctuated::Punctuated;
use syn::spanned::Spanned;
use syn::visit::{self, Visit};
use syn::{Attribute, BinOp, Expr, ExprMethodCall, ItemMod, Token};

/// The list, relative to the repository.
const LIST: &str = "tests/panic_sites.toml";
/// Prints the missing entries where it is `print`.
const PRINT_VARIABLE: &str = "RINGTUN_PANIC_SITES";

const PANICKING_MACROS: [&str; 7] = [
    "panic",
    "unreachable",
    "todo",
    "unimplemented",
    "assert",
    "assert_eq",
    "assert_ne",
];
/// Methods that panic on some arguments or some receivers.
const PANICKING_CALLS: [&str; 27] = [
    "unwrap",
    "expect",
    "unwrap_err",
    "expect_err",
    "copy_from_slice",
    "clone_from_slice",
    "copy_within",
    "split_at",
    "split_at_mut",
    "split_off",
    "split_to",
    "drain",
    "remove",
    "swap_remove",
    "swap",
    "rotate_left",
    "rotate_right",
    "select_nth_unstable",
    "clamp",
    "borrow",
    "borrow_mut",
    "ilog2",
    "ilog10",
    "mul_f64",
    "div_f64",
    "from_secs_f64",
    "from_secs_f32",
];
/// Methods that panic on the argument 0.
const PANICKING_UNLESS_LITERAL: [&str; 9] = [
    "chunks",
    "chunks_exact",
    "chunks_mut",
    "windows",
    "step_by",
    "div_ceil",
    "rem_euclid",
    "div_euclid",
    "next_multiple_of",
];

#[derive(Deserialize)]
#[serde(deny_unknown_fields)]
struct List {
    /// Files and folders that peers' bytes reach.
    files: Vec<String>,
    /// Those of them in which subtractions and multiplications are sites.
    arithmetic: Vec<String>,
    /// By file: `function, kind, how many`, and why none of them can panic.
    sites: BTreeMap<String, BTreeMap<String, String>>,
}

/// File and `function, kind, how many`.
type Entry = (String, String);

#[test]
fn every_site_that_could_panic_has_its_reason() {
    let root = Path::new(env!("CARGO_MANIFEST_DIR"));
    let text = fs::read_to_string(root.join(LIST)).expect(LIST);
    let list: List = toml::from_str(&text).expect(LIST);
    let found = sites(root, &list);
    let mut listed = BTreeMap::new();
    for (file, entries) in &list.sites {
        for (entry, reason) in entries {
            listed.insert((file.clone(), entry.clone()), reason.trim());
        }
    }
    let missing: Vec<_> = found
        .iter()
        .filter(|(entry, _)| !listed.contains_key(entry))
        .collect();
    if std::env::var(PRINT_VARIABLE).is_ok_and(|value| value == "print") {
        print!("{}", as_toml(missing.iter().map(|(entry, _)| *entry)));
    }
    let mut faults = String::new();
    for ((file, entry), lines) in missing {
        writeln!(faults, "not listed: {file}: {entry} (lines {lines:?})").expect("memory");
    }
    for ((file, entry), reason) in &listed {
        if !found.contains_key(&(file.clone(), entry.clone())) {
            writeln!(faults, "listed, but not there: {file}: {entry}").expect("memory");
        } else if reason.is_empty() {
            writeln!(faults, "without a reason: {file}: {entry}").expect("memory");
        }
    }
    assert!(
        faults.is_empty(),
        "{faults}\nRemove the site, or give the reason why it cannot panic in {LIST}."
    );
}

/// All sites, and the lines that they are on.
fn sites(root: &Path, list: &List) -> BTreeMap<Entry, Vec<usize>> {
    let mut sites = BTreeMap::new();
    for path in source_files(root, &list.files) {
        let name = path.strip_prefix(root).expect("below the root");
        let name = name.to_str().expect("ASCII").to_owned();
        let source = fs::read_to_string(&path).expect("a file");
        let file = syn::parse_file(&source).unwrap_or_else(|error| panic!("{name}: {error}"));
        let mut finder = Finder {
            arithmetic: list.arithmetic.iter().any(|part| name.starts_with(part)),
            ..Finder::default()
        };
        finder.visit_file(&file);
        for ((function, kind), lines) in finder.found {
            let entry = format!("{function}, {kind}, {}", lines.len());
            sites.insert((name.clone(), entry), lines);
        }
    }
    sites
}

/// Files of Rust below the given ones, without modules that are only for tests.
fn source_files(root: &Path, parts: &[String]) -> BTreeSet<PathBuf> {
    let mut files = BTreeSet::new();
    for part in parts {
        let path = root.join(part);
        assert!(path.exists(), "{LIST}: there is no {part}");
        collect(&path, &mut files);
    }
    let mut tests = Vec::new();
    for file in &files {
        let source = fs::read_to_string(file).expect("a file");
        let parsed =
            syn::parse_file(&source).unwrap_or_else(|error| panic!("{}: {error}", file.display()));
        let folder = match file.file_name().and_then(|name| name.to_str()) {
            Some("mod.rs" | "lib.rs" | "main.rs") => file.parent().expect("a folder").to_owned(),
            _ => file.with_extension(""),
        };
        for item in parsed.items {
            if let syn::Item::Mod(ItemMod {
                attrs,
                ident,
                content: None,
                ..
            }) = item
                && is_for_tests(&attrs)
            {
                tests.push(folder.join(ident.to_string()));
            }
        }
    }
    files.retain(|file| {
        tests
            .iter()
            .all(|test| !file.starts_with(test) && *file != test.with_extension("rs"))
    });
    files
}

fn collect(path: &Path, files: &mut BTreeSet<PathBuf>) {
    if path.is_dir() {
        for entry in fs::read_dir(path).expect("a folder") {
            collect(&entry.expect("an entry").path(), files);
        }
    } else if path.extension().is_some_and(|extension| extension == "rs") {
        files.insert(path.to_owned());
    }
}

fn is_for_tests(attributes: &[Attribute]) -> bool {
    attributes.iter().any(|attribute| {
        attribute.path().is_ident("test")
            || attribute.path().is_ident("cfg")
                && attribute
                    .parse_args::<syn::Ident>()
                    .is_ok_and(|name| name == "test")
    })
}

fn as_toml<'e>(entries: impl Iterator<Item = &'e Entry>) -> String {
    let (mut text, mut last) = (String::new(), "");
    for (file, entry) in entries {
        if file != last {
            writeln!(text, "\n[sites.\"{file}\"]").expect("memory");
            last = file;
        }
        writeln!(text, "\"{entry}\" = \"\"").expect("memory");
    }
    text
}

/// Walks a file.
#[derive(Default)]
struct Finder {
    arithmetic: bool,
    /// The type whose `impl` this is in, and the functions that this is in.
    names: Vec<String>,
    /// By function and kind: the lines.
    found: BTreeMap<(String, String), Vec<usize>>,
}

impl Finder {
    fn add(&mut self, kind: &str, spanned: &impl Spanned) {
        let function = self.names.join("::");
        let lines = self.found.entry((function, kind.to_owned())).or_default();
        lines.push(spanned.span().start().line);
    }

    fn inside(&mut self, name: String, visit: impl FnOnce(&mut Self)) {
        self.names.push(name);
        visit(self);
        self.names.pop();
    }

    /// The arguments of a macro, where they are expressions; else what the tokens show.
    fn macro_arguments(&mut self, tokens: TokenStream) {
        let list = Punctuated::<Expr, Token![,]>::parse_terminated;
        if let Ok(arguments) = list.parse2(tokens.clone()) {
            arguments.iter().for_each(|one| self.visit_expr(one));
        } else {
            self.tokens(tokens);
        }
    }

    fn tokens(&mut self, tokens: TokenStream) {
        let mut last: Option<TokenTree> = None;
        for token in tokens {
            if let TokenTree::Group(group) = &token {
                match (&last, group.delimiter()) {
                    (Some(TokenTree::Ident(name)), proc_macro2::Delimiter::Parenthesis)
                        if PANICKING_CALLS.contains(&&name.to_string()[..]) =>
                    {
                        self.add(&name.to_string(), name);
                    }
                    (Some(TokenTree::Ident(_)), proc_macro2::Delimiter::Bracket) => {
                        self.add("index", group);
                    }
                    _ => {}
                }
                self.tokens(group.stream());
            }
            last = Some(token);
        }
    }

    fn call(&mut self, name: &syn::Ident, arguments: &Punctuated<Expr, Token![,]>) {
        let first = arguments.first();
        let panics = match &name.to_string()[..] {
            // All of it can always be taken out.
            "drain" => !first.is_some_and(is_full_range),
            // By reference is what maps have.
            "remove" => !matches!(first, Some(Expr::Reference(_))),
            // Atomics have it, too.
            "swap" => {
                !matches!(arguments.last(), Some(Expr::Path(path)) if path.path.segments.len() > 1)
            }
            // With an argument these belong to other traits.
            "borrow" | "borrow_mut" => first.is_none(),
            other if PANICKING_CALLS.contains(&other) => true,
            other => {
                PANICKING_UNLESS_LITERAL.contains(&other)
                    && !first.is_some_and(|first| is_literal(first) || is_constant(first))
            }
        };
        if panics {
            self.add(&name.to_string(), name);
        }
    }
}

impl<'ast> Visit<'ast> for Finder {
    fn visit_item(&mut self, item: &'ast syn::Item) {
        let attributes = match item {
            // Computed at compile time.
            syn::Item::Const(_) | syn::Item::Static(_) => return,
            syn::Item::Fn(item) => &item.attrs,
            syn::Item::Impl(item) => &item.attrs,
            syn::Item::Mod(item) => &item.attrs,
            _ => return visit::visit_item(self, item),
        };
        if !is_for_tests(attributes) {
            visit::visit_item(self, item);
        }
    }

    fn visit_item_fn(&mut self, item: &'ast syn::ItemFn) {
        self.inside(item.sig.ident.to_string(), |this| {
            visit::visit_item_fn(this, item);
        });
    }

    fn visit_item_impl(&mut self, item: &'ast syn::ItemImpl) {
        let name = match &*item.self_ty {
            syn::Type::Path(path) => path.path.segments.last().map(|last| last.ident.to_string()),
            _ => None,
        };
        self.inside(name.unwrap_or_default(), |this| {
            visit::visit_item_impl(this, item);
        });
    }

    fn visit_impl_item_fn(&mut self, item: &'ast syn::ImplItemFn) {
        if !is_for_tests(&item.attrs) {
            self.inside(item.sig.ident.to_string(), |this| {
                visit::visit_impl_item_fn(this, item);
            });
        }
    }

    fn visit_trait_item_fn(&mut self, item: &'ast syn::TraitItemFn) {
        self.inside(item.sig.ident.to_string(), |this| {
            visit::visit_trait_item_fn(this, item);
        });
    }

    fn visit_impl_item_const(&mut self, _: &'ast syn::ImplItemConst) {}

    fn visit_trait_item_const(&mut self, _: &'ast syn::TraitItemConst) {}

    fn visit_type_array(&mut self, _: &'ast syn::TypeArray) {}

    fn visit_expr_repeat(&mut self, repeat: &'ast syn::ExprRepeat) {
        self.visit_expr(&repeat.expr);
    }

    fn visit_macro(&mut self, call: &'ast syn::Macro) {
        let Some(name) = call.path.segments.last().map(|last| last.ident.to_string()) else {
            return;
        };
        if name.starts_with("debug_assert") {
            return;
        }
        if PANICKING_MACROS.contains(&&name[..]) {
            self.add(&format!("{name}!"), call);
        }
        self.macro_arguments(call.tokens.clone());
    }

    fn visit_expr_index(&mut self, index: &'ast syn::ExprIndex) {
        if !is_full_range(&index.index) {
            self.add("index", &index.index);
        }
        visit::visit_expr_index(self, index);
    }

    fn visit_expr_method_call(&mut self, call: &'ast ExprMethodCall) {
        self.call(&call.method, &call.args);
        visit::visit_expr_method_call(self, call);
    }

    fn visit_expr_call(&mut self, call: &'ast syn::ExprCall) {
        if let Expr::Path(path) = &*call.func
            && let Some(last) = path.path.segments.last()
            && path.path.segments.len() > 1
        {
            self.call(&last.ident, &call.args);
        }
        visit::visit_expr_call(self, call);
    }

    fn visit_expr_path(&mut self, path: &'ast syn::ExprPath) {
        // A function by its name, as in `map(Result::unwrap)`.
        if let Some(last) = path.path.segments.last()
            && path.path.segments.len() > 1
            && ["unwrap", "expect"].contains(&&last.ident.to_string()[..])
        {
            self.add(&last.ident.to_string(), path);
        }
        visit::visit_expr_path(self, path);
    }

    fn visit_expr_binary(&mut self, binary: &'ast syn::ExprBinary) {
        let known = |side: &Expr| is_literal(side) || is_constant(side);
        let (left, right) = (known(&binary.left), known(&binary.right));
        match binary.op {
            BinOp::Div(_) | BinOp::DivAssign(_) | BinOp::Rem(_) | BinOp::RemAssign(_) if !right => {
                self.add("divide", &binary.op);
            }
            BinOp::Sub(_) | BinOp::SubAssign(_) if self.arithmetic && !(left && right) => {
                self.add("subtract", &binary.op);
            }
            BinOp::Mul(_) | BinOp::MulAssign(_) if self.arithmetic && !left && !right => {
                self.add("multiply", &binary.op);
            }
            _ => {}
        }
        visit::visit_expr_binary(self, binary);
    }
}

fn is_full_range(index: &Expr) -> bool {
    matches!(index, Expr::Range(range) if range.start.is_none() && range.end.is_none())
}

fn is_literal(expression: &Expr) -> bool {
    match expression {
        Expr::Lit(_) => true,
        Expr::Paren(inner) => is_literal(&inner.expr),
        Expr::Cast(cast) => is_literal(&cast.expr) || is_constant(&cast.expr),
        Expr::Binary(binary) => {
            let known = |side: &Expr| is_literal(side) || is_constant(side);
            known(&binary.left) && known(&binary.right)
        }
        _ => false,
    }
}

/// A name in capitals. Dividing by one that is 0 does not compile.
fn is_constant(expression: &Expr) -> bool {
    let Expr::Path(path) = expression else {
        return false;
    };
    let last = path.path.segments.last().map(|last| last.ident.to_string());
    last.is_some_and(|name| !name.chars().any(char::is_lowercase))
}

#[test]
fn sites_are_found_in_any_disguise() {
    let source = r#"
        const LENGTH: usize = [1, 2][0];
        impl Parser {
            fn read(&self, bytes: &[u8], at: usize) -> u8 {
                debug_assert!(bytes[0] == 0);
                assert!(bytes[1] > 0);
                tracing::debug!("{}", bytes[at..at + 2].len());
                let all = &bytes[..];
                let half = all.len() / at + all.len() / 2 + all.len() % LENGTH;
                if matches!(all.first(), Some(first) if list[0].unwrap() == *first) {}
                map.remove(&at);
                list.remove(at);
                list.drain(..);
                (half - at) as u8
            }
        }
        #[cfg(test)]
        mod tests {
            fn test() { panic!() }
        }
        fn free() { let all: Vec<u8> = iter.map(Result::unwrap).collect(); unreachable!("{}", x.expect("y")) }
    "#;
    let mut finder = Finder {
        arithmetic: true,
        ..Finder::default()
    };
    finder.visit_file(&syn::parse_file(source).expect("Rust"));
    let found: Vec<_> = finder
        .found
        .iter()
        .map(|((function, kind), lines)| (&function[..], &kind[..], lines.len()))
        .collect();
    assert_eq!(
        found,
        [
            ("Parser::read", "assert!", 1),
            ("Parser::read", "divide", 1),
            ("Parser::read", "index", 3),
            ("Parser::read", "remove", 1),
            ("Parser::read", "subtract", 1),
            ("Parser::read", "unwrap", 1),
            ("free", "expect", 1),
            ("free", "unreachable!", 1),
            ("free", "unwrap", 1),
        ]
    );
}

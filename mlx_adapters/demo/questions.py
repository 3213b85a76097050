"""The question templates of the embedded data, by SQL pattern and split.

A pattern is one shape of SQL with slots such as {dept}; each of its templates is one wording. No wording is in
two splits, and the patterns marked with no training wordings appear in the test rows only: they recombine
parts (a join, a count, a negation) that training shows apart. A slot's value is a pair: words for the
question, SQL for the query.
"""

from dataclasses import dataclass

SPLITS = ("train", "valid", "test")


@dataclass(frozen=True)
class Pattern:
    """One shape of SQL and its wordings for each split."""

    name: str
    sql: str
    train: tuple[str, ...] = ()
    valid: tuple[str, ...] = ()
    test: tuple[str, ...] = ()


SIZES = [
    *((f"more than {n} credits", f"credits > {n}") for n in (1, 2, 3, 4)),
    *((f"fewer than {n} credits", f"credits < {n}") for n in (2, 3, 4, 5)),
    *((f"at least {n} credits", f"credits >= {n}") for n in (2, 3, 4, 5)),
    *((f"at most {n} credits", f"credits <= {n}") for n in (1, 2, 3, 4)),
    *((f"exactly {n} credits", f"credits = {n}") for n in (1, 2, 3, 4, 5)),
    *((f"more than {n} seats", f"seats > {n}") for n in (30, 40, 50, 60, 80)),
    *((f"fewer than {n} seats", f"seats < {n}") for n in (30, 40, 50, 60, 80)),
    *((f"at least {n} seats", f"seats >= {n}") for n in (35, 45, 70)),
    *((f"at most {n} seats", f"seats <= {n}") for n in (35, 45, 70)),
]
MEASURES = [
    ("average number of credits", "AVG(credits)"),
    ("average number of seats", "AVG(seats)"),
    ("total number of credits", "SUM(credits)"),
    ("total number of seats", "SUM(seats)"),
    ("highest number of credits", "MAX(credits)"),
    ("highest number of seats", "MAX(seats)"),
    ("lowest number of credits", "MIN(credits)"),
    ("lowest number of seats", "MIN(seats)"),
]
ORDERS = [
    ("with the most seats first", "seats DESC"),
    ("with the fewest seats first", "seats"),
    ("in alphabetical order", "title"),
    ("in reverse alphabetical order", "title DESC"),
]
HIRED = [
    *((f"after {year}", f"hired > {year}") for year in (2001, 2004, 2007, 2010, 2013, 2016)),
    *((f"before {year}", f"hired < {year}") for year in (2003, 2006, 2009, 2012, 2015, 2018)),
    *((f"in {year}", f"hired = {year}") for year in (2005, 2008, 2011, 2014)),
]
KEYS = [("department", "dept"), ("instructor", "teacher")]
FACTS = [("credits", "credits"), ("seats", "seats")]
MOST = [("most", "DESC"), ("fewest", "ASC")]
COUNTS = [(str(n), str(n)) for n in (1, 2, 3, 4, 5)]

PATTERNS = (
    # -- one table ---------------------------------------------------------------------------------
    Pattern(
        "courses of a department",
        "SELECT title FROM courses WHERE dept = '{dept}'",
        train=(
            "List the {dept} courses.",
            "Which courses does the {dept} department offer?",
            "Show the titles of all courses in {dept}.",
            "What courses are there in {dept}?",
            "Name every course of the {dept} department.",
        ),
        valid=("What can one study in {dept}?",),
        test=("Give me the course titles of the {dept} department.", "Find all courses that {dept} offers."),
    ),
    Pattern(
        "courses of a size",
        "SELECT title FROM courses WHERE {size}",
        train=(
            "Which courses have {size}?",
            "List the courses with {size}.",
            "Show all course titles with {size}.",
            "Name the courses that have {size}.",
        ),
        valid=("What courses come with {size}?",),
        test=("Find every course with {size}.", "Give the titles of courses having {size}."),
    ),
    Pattern(
        "courses of a department and size",
        "SELECT title FROM courses WHERE dept = '{dept}' AND {size}",
        train=(
            "Which {dept} courses have {size}?",
            "List the {dept} courses with {size}.",
            "What courses in {dept} have {size}?",
            "Show courses of the {dept} department with {size}.",
        ),
        valid=("In {dept}, name the courses with {size}.",),
        test=("Find the courses in {dept} that have {size}.", "Name every {dept} course with {size}."),
    ),
    Pattern(
        "a fact of a course",
        "SELECT {fact} FROM courses WHERE title = '{title}'",
        train=(
            "How many {fact} does {title} have?",
            "What is the number of {fact} of {title}?",
            "Show the {fact} of the course {title}.",
            "Tell me how many {fact} there are in {title}.",
        ),
        valid=("{title}: how many {fact}?",),
        test=("How many {fact} are there in the course {title}?", "Give the number of {fact} for {title}."),
    ),
    Pattern(
        "teacher of a course",
        "SELECT teacher FROM courses WHERE title = '{title}'",
        train=(
            "Who teaches {title}?",
            "Which instructor gives the course {title}?",
            "Name the teacher of {title}.",
            "Who is the instructor of {title}?",
        ),
        valid=("Who gives {title}?",),
        test=("By whom is {title} taught?", "Which teacher holds the course {title}?"),
    ),
    Pattern(
        "courses of a teacher",
        "SELECT title FROM courses WHERE teacher = '{teacher}'",
        train=(
            "Which courses does {teacher} teach?",
            "List the courses taught by {teacher}.",
            "What does {teacher} teach?",
            "Show all course titles of instructor {teacher}.",
        ),
        valid=("Name the courses that {teacher} gives.",),
        test=("Find all courses taught by {teacher}.", "What courses are given by {teacher}?"),
    ),
    Pattern(
        "instructors by year",
        "SELECT name FROM instructors WHERE {hired}",
        train=(
            "Which instructors were hired {hired}?",
            "List the instructors hired {hired}.",
            "Who was hired {hired}?",
            "Show the names of instructors hired {hired}.",
        ),
        valid=("Name all teachers hired {hired}.",),
        test=("Find the instructors who were hired {hired}.", "Give the names of those hired {hired}."),
    ),
    # -- negation ----------------------------------------------------------------------------------
    Pattern(
        "courses not of a department",
        "SELECT title FROM courses WHERE dept <> '{dept}' AND {size}",
        train=(
            "Which courses with {size} are not in {dept}?",
            "List the courses outside {dept} with {size}.",
            "Show courses that have {size} but are not in {dept}.",
            "What courses not in {dept} have {size}?",
        ),
        valid=("Name courses with {size} except those in {dept}.",),
        test=("Find courses with {size} that are not in {dept}.", "Outside {dept}, which courses have {size}?"),
    ),
    Pattern(
        "courses of a department without a teacher",
        "SELECT title FROM courses WHERE dept = '{dept}' AND teacher <> '{teacher}'",
        train=(
            "Which {dept} courses are not taught by {teacher}?",
            "List the {dept} courses that {teacher} does not teach.",
            "Show courses in {dept} not taught by {teacher}.",
            "What {dept} courses are taught by someone other than {teacher}?",
        ),
        valid=("Name the {dept} courses without {teacher} as teacher.",),
        test=(
            "Find all courses in {dept} that {teacher} does not teach.",
            "Which courses in {dept} are not given by {teacher}?",
        ),
    ),
    Pattern(
        "courses without prerequisites",
        "SELECT title FROM courses WHERE dept = '{dept}' AND title NOT IN (SELECT course FROM prerequisites)",
        train=(
            "Which {dept} courses have no prerequisites?",
            "List the {dept} courses without prerequisites.",
            "Show courses in {dept} that need no other course.",
            "What {dept} courses can be taken without any prerequisite?",
        ),
        valid=("Name the courses in {dept} with no prerequisite.",),
        test=("Find {dept} courses that have no prerequisite.", "In {dept}, which courses have no prerequisites?"),
    ),
    Pattern(
        "courses that nothing requires",
        "SELECT title FROM courses WHERE dept = '{dept}' AND title NOT IN (SELECT requires FROM prerequisites)",
        train=(
            "Which {dept} courses are not required by any course?",
            "List the {dept} courses that no course requires.",
            "Show courses in {dept} that are required by no other course.",
            "What {dept} courses are never required?",
        ),
        valid=("Name the {dept} courses nothing else requires.",),
        test=(
            "Find the courses in {dept} that no other course requires.",
            "Which courses in {dept} are required by nothing?",
        ),
    ),
    Pattern(
        "instructors who do not teach",
        "SELECT name FROM instructors WHERE {hired} AND name NOT IN (SELECT teacher FROM courses)",
        train=(
            "Which instructors hired {hired} teach no course?",
            "List the instructors hired {hired} who do not teach.",
            "Who was hired {hired} and teaches nothing?",
            "Show instructors hired {hired} without a course.",
        ),
        valid=("Name those hired {hired} who have no course.",),
        test=("Find the instructors hired {hired} who teach nothing.", "Who hired {hired} does not teach any course?"),
    ),
    # -- counting and grouping ---------------------------------------------------------------------
    Pattern(
        "count of a department",
        "SELECT COUNT(*) FROM courses WHERE dept = '{dept}' AND {size}",
        train=(
            "How many {dept} courses have {size}?",
            "Count the {dept} courses with {size}.",
            "How many courses in {dept} have {size}?",
            "What is the number of {dept} courses with {size}?",
        ),
        valid=("In {dept}, how many courses have {size}?",),
        test=("Count the courses in {dept} that have {size}.", "How many courses with {size} are in {dept}?"),
    ),
    Pattern(
        "count of a teacher",
        "SELECT COUNT(*) FROM courses WHERE teacher = '{teacher}'",
        train=(
            "How many courses does {teacher} teach?",
            "Count the courses taught by {teacher}.",
            "What is the number of courses of {teacher}?",
            "On how many courses is {teacher} the teacher?",
        ),
        valid=("How many courses are taught by {teacher}?",),
        test=("Count the courses of {teacher}.", "How many courses has {teacher}?"),
    ),
    Pattern(
        "a measure of a department",
        "SELECT {measure} FROM courses WHERE dept = '{dept}'",
        train=(
            "What is the {measure} in {dept}?",
            "Show the {measure} of {dept} courses.",
            "Compute the {measure} of courses in {dept}.",
            "Tell me the {measure} of a {dept} course.",
        ),
        valid=("In {dept}, what is the {measure}?",),
        test=("Find the {measure} of the courses in {dept}.", "What {measure} do {dept} courses have?"),
    ),
    Pattern(
        "count by group",
        "SELECT {key}, COUNT(*) FROM courses WHERE {size} GROUP BY {key}",
        train=(
            "How many courses with {size} are there per {key}?",
            "Count the courses with {size} for each {key}.",
            "For each {key}, how many courses have {size}?",
            "Show the number of courses with {size} by {key}.",
        ),
        valid=("Per {key}, count the courses with {size}.",),
        test=("For every {key}, count the courses with {size}.", "How many courses with {size} has each {key}?"),
    ),
    Pattern(
        "a measure by group",
        "SELECT {key}, {measure} FROM courses GROUP BY {key}",
        train=(
            "What is the {measure} per {key}?",
            "Show the {measure} for each {key}.",
            "For each {key}, what is the {measure}?",
            "List each {key} with the {measure}.",
        ),
        valid=("By {key}, give the {measure}.",),
        test=("Compute the {measure} for every {key}.", "What is the {measure} of each {key}?"),
    ),
    Pattern(
        "groups of a size",
        "SELECT {key} FROM courses WHERE {size} GROUP BY {key} HAVING COUNT(*) > {count}",
        train=(
            "Which {key} has more than {count} courses with {size}?",
            "List each {key} with more than {count} courses of {size}.",
            "Show every {key} that has more than {count} courses with {size}.",
        ),
        valid=("Name each {key} having over {count} courses with {size}.",),
        test=("Find each {key} that has more than {count} courses with {size}.",),
    ),
    # -- ordering ----------------------------------------------------------------------------------
    Pattern(
        "ordered courses of a department",
        "SELECT title FROM courses WHERE dept = '{dept}' ORDER BY {order}",
        train=(
            "List the {dept} courses {order}.",
            "Show all courses in {dept} {order}.",
            "Which courses are in {dept}, {order}?",
            "Name the courses of the {dept} department {order}.",
        ),
        valid=("Sort the {dept} courses {order}.",),
        test=("Give the {dept} course titles {order}.", "Find the courses in {dept}, {order}."),
    ),
    Pattern(
        "largest course of a department",
        "SELECT title FROM courses WHERE dept = '{dept}' ORDER BY seats {most} LIMIT 1",
        train=(
            "Which {dept} course has the {most} seats?",
            "Show the course in {dept} with the {most} seats.",
            "What is the {dept} course with the {most} seats?",
            "Name the {dept} course that has the {most} seats.",
        ),
        valid=("In {dept}, what course has the {most} seats?",),
        test=("Find the course with the {most} seats in {dept}.", "Which course in {dept} offers the {most} seats?"),
    ),
    Pattern(
        "largest courses of a size",
        "SELECT title FROM courses WHERE {size} ORDER BY seats {most} LIMIT {count}",
        train=(
            "Of the courses with {size}, show the {count} with the {most} seats.",
            "List the {count} courses with the {most} seats among those with {size}.",
            "Which {count} courses with {size} have the {most} seats?",
        ),
        valid=("Among courses with {size}, name the {count} with the {most} seats.",),
        test=("Find the {count} courses with {size} that have the {most} seats.",),
    ),
    # -- joins -------------------------------------------------------------------------------------
    Pattern(
        "courses in a building",
        "SELECT title FROM courses JOIN departments ON dept = name WHERE building = '{building}' AND {size}",
        train=(
            "Which courses in {building} have {size}?",
            "List the courses with {size} in {building}.",
            "What courses held in {building} have {size}?",
            "Show courses of the {building} building with {size}.",
        ),
        valid=("In {building}, which courses have {size}?",),
        test=("Find the courses in {building} with {size}.", "Name the courses held in {building} that have {size}."),
    ),
    Pattern(
        "building of a course",
        "SELECT building FROM courses JOIN departments ON dept = name WHERE title = '{title}'",
        train=(
            "In which building is {title} held?",
            "What building is the course {title} in?",
            "Where is {title} taught?",
            "Show the building of {title}.",
        ),
        valid=("Where is the course {title} held?",),
        test=("Which building is {title} taught in?", "In what building is the course {title}?"),
    ),
    Pattern(
        "courses by the teacher's year",
        "SELECT title FROM courses JOIN instructors ON teacher = name WHERE {hired}",
        train=(
            "Which courses are taught by instructors hired {hired}?",
            "List the courses of teachers hired {hired}.",
            "What do instructors hired {hired} teach?",
            "Show courses whose teacher was hired {hired}.",
        ),
        valid=("Name the courses of instructors hired {hired}.",),
        test=("Find courses taught by those hired {hired}.", "Which courses have a teacher hired {hired}?"),
    ),
    Pattern(
        "what a course requires",
        "SELECT requires FROM prerequisites WHERE course = '{title}'",
        train=(
            "What does {title} require?",
            "Which courses must be taken before {title}?",
            "List the prerequisites of {title}.",
            "What are the prerequisites of {title}?",
        ),
        valid=("What must I take before {title}?",),
        test=("Which courses does {title} require?", "Name all prerequisites for {title}."),
    ),
    Pattern(
        "what requires a course",
        "SELECT course FROM prerequisites WHERE requires = '{title}'",
        train=(
            "Which courses require {title}?",
            "List the courses that need {title}.",
            "For which courses is {title} a prerequisite?",
            "What courses have {title} as a prerequisite?",
        ),
        valid=("What needs {title}?",),
        test=("Find all courses that require {title}.", "{title} is a prerequisite of which courses?"),
    ),
    Pattern(
        "a fact of the prerequisites",
        "SELECT title, {fact} FROM courses JOIN prerequisites ON title = requires WHERE course = '{title}'",
        train=(
            "Show each prerequisite of {title} with its {fact}.",
            "How many {fact} do the prerequisites of {title} have?",
            "List the prerequisites of {title} and their {fact}.",
            "What are the {fact} of the courses that {title} requires?",
        ),
        valid=("Give the {fact} of each prerequisite of {title}.",),
        test=("Name the prerequisites of {title} with their {fact}.",),
    ),
    Pattern(
        "count by building",
        "SELECT building, COUNT(*) FROM courses JOIN departments ON dept = name WHERE {size} GROUP BY building",
        train=(
            "How many courses with {size} are there per building?",
            "Count the courses with {size} for each building.",
            "For each building, how many courses have {size}?",
            "Show the number of courses with {size} by building.",
        ),
        valid=("Per building, count the courses with {size}.",),
        test=("For every building, count the courses with {size}.",),
    ),
    # -- recombined: no training wordings ----------------------------------------------------------
    Pattern(
        "count in a building",
        "SELECT COUNT(*) FROM courses JOIN departments ON dept = name WHERE building = '{building}' AND {size}",
        test=("How many courses in {building} have {size}?", "Count the courses in {building} with {size}."),
    ),
    Pattern(
        "ordered courses of a teacher",
        "SELECT title FROM courses WHERE teacher = '{teacher}' ORDER BY {order}",
        test=("List the courses taught by {teacher} {order}.",),
    ),
    Pattern(
        "a measure by building",
        "SELECT building, {measure} FROM courses JOIN departments ON dept = name GROUP BY building",
        test=("Show the {measure} for each building.",),
    ),
)

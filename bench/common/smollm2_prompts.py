"""What SmolLM2 is asked: prompts to calibrate with, held-out ones to measure on, and many that a draft is trained on.

All were written for this file. The three sets have no prompt in common and hardly a subject.
"""

from __future__ import annotations

import random

__all__ = ["CALIBRATION", "EDITS", "HELD_OUT", "training_prompts"]

# Texts to be written again: most of an answer is in its request.
EDITS = tuple(
    f"Correct the spelling of the following text. Write the whole text again, and nothing else.\n\n{text}"
    for text in (
        "The old lighthous stood at the end of the harbour wall. Every evening the keeper climbed its one hundred and "
        "twelve steps, lit the lamp and wrote the wether into his book. In the winter of the great storm he wrote "
        "nothing for three days, since the door was frozen, and the fishermen thougt that he had left.",
        "Bees find their way by the sun. When a bee comes home from a field of flowers, it dances on the comb, and the "
        "angle of its dance tells the other bees where the field is. On cloudy days they see the sun all the same, "
        "becouse their eyes notice how its light is polarised.",
        "def total_price(items):\n    total = 0.0\n    for item in items:\n        price = item.price * item.quantity\n"
        "        if item.discount is not None:\n            price = price * (1.0 - item.discount)\n"
        "        total = total + price\n    retrun round(total, 2)",
        "Dear colleagues, the lift in the east wing will be repaired on Thursday and on Friday. Please use the stairs "
        "or the lift in the west wing on these two days. If you expect visitors who cannot climb stairs, tell the "
        "reception a day befor they come, and we will find a room on the ground floor for your meeting.",
        "A glacier is a river of ice. Snow falls on it year after year, is pressed together, and becomes ice under its "
        "own weight. Slowly the ice moves downhill, a few centimeters or a few meters every day, and carries stones "
        "with it. Where it melts it leaves them behind, and thier lines tell how far the glacier once came.",
        "The recipe needs four eggs, two hundred grams of flour, half a litre of milk, a pinch of salt and some butter "
        "for the pan. Beat the eggs, add the flour and the salt, and pour in the milk while you stir. Let the dough "
        "rest for half an hour. Then melt some butter in the pan and bake one pancake after the othr on both sides.",
    )
)

CALIBRATION = (
    "Explain why ice floats on water, in words that a ten-year-old understands.",
    "List six things that belong into a first-aid kit and say for each what it is for.",
    "Write a Python function that returns the second largest number of a list. Add a docstring.",
    "Rewrite this sentence so that it sounds polite: Send me the invoice now or I will not pay.",
    "Write a short letter to a landlord about a radiator that does not get warm.",
    "What is the difference between a violin and a viola?",
    "Summarise in two sentences: The river had risen for three days. On Tuesday night it came over the dam, and the "
    "lower streets of the village stood under water until noon. Nobody was hurt, but the baker lost two ovens, and the "
    "school will stay closed until the floors are dry.",
    "Write a Python class for a bank account with deposit, withdraw and a readable representation.",
    "Give me a recipe for a simple potato soup for four people.",
    "How do I change the tyre of a bicycle? Number the steps.",
    "Write a poem of eight lines about the last train of the night.",
    "Name three reasons for, and three against, working from home.",
    "Write Python code that counts how often each word occurs in a text file and prints the ten most frequent ones.",
    "Who was Johannes Kepler and what is he known for?",
    "Translate into plain English: The remuneration shall be disbursed subsequent to the completion of the assignment.",
    "Invent a dialogue between a librarian and a boy who has lost a book.",
    "What happens in the body when we sleep?",
    "Write an e-mail to colleagues that moves the meeting from Monday to Wednesday.",
    "Explain recursion with an example in Python.",
    "Describe a harbour in the early morning for the beginning of a novel.",
    "A shop sells pens at 3 for 2 dollars. What do 12 pens cost? Show how you get there.",
    "Make a table of contents for a handbook on keeping bees.",
    "Write a SQL query that finds all customers without an order, and explain it.",
    "How did people keep food fresh before there were refrigerators?",
)

HELD_OUT = (
    "Explain how a sundial works to somebody who has never seen one.",
    "List five exercises for a stiff neck that can be done at a desk.",
    "Write a Python function that tells whether a string is a palindrome, ignoring case and spaces.",
    "Rewrite in the past tense: The fox runs through the garden, jumps over the wall and sees the hens.",
    "Write a letter of thanks to a neighbour who watered the plants during the holidays.",
    "What is the difference between a lake and a lagoon?",
    "Summarise in one sentence: The museum bought the painting in 1931 as the work of an unknown master. When it was "
    "cleaned last year, a signature appeared under the varnish. Two experts now say that it was painted by a pupil of "
    "Rubens, a third one doubts it, and the museum has hung it beside the entrance.",
    "Write a Python class for a stack with push, pop and peek, and show how it is used.",
    "Give me a recipe for pancakes without eggs.",
    "How do I repot a cactus? Number the steps.",
    "Write a story of about a hundred words about a lighthouse keeper who finds a message in a bottle.",
    "What are the advantages and disadvantages of electric cars?",
    "Write Python code that reads a CSV file and prints the average of each numeric column.",
    "Who was Marie Curie and what did she discover?",
    "Make this sound more formal: Hey, the printer is broken again, can someone have a look?",
    "Invent an interview with a retired astronaut, four questions and answers.",
    "Why do leaves change their colour in autumn?",
    "Write an announcement for a concert of a school choir.",
    "Explain what a hash table is and why looking up a key is fast. Use Python in your example.",
    "Describe the smell and the sounds of a market hall.",
    "A train covers 180 km in 2 hours and 30 minutes. How fast is it on average? Show how you get there.",
    "Draw up a plan for a weekend in the mountains with two small children.",
    "Write a shell command that finds all files larger than 100 MB, and explain its parts.",
    "How does a vaccine protect against a disease?",
)

_SUBJECTS = (
    "volcanoes", "the Roman aqueducts", "chess", "compound interest", "photosynthesis", "the French Revolution",
    "sourdough bread", "honey", "glaciers", "the printing press", "solar panels", "the water cycle", "jazz",
    "earthquakes", "the human heart", "whales", "coral reefs", "tea", "black holes", "the Silk Road", "windmills",
    "dinosaurs", "the stock market", "elephants", "gravity", "rainbows", "the steam engine", "penguins",
    "antibiotics", "inflation", "magnets", "the Great Wall of China", "marathon running", "tides", "origami",
    "the internet", "submarines", "cheese", "the Olympic Games", "spiders", "batteries", "the moon", "football",
    "ants", "bridges", "the violin maker's craft", "wolves", "the telephone", "deserts", "chocolate", "butterflies",
    "the immune system", "tornadoes", "olive oil", "the compass", "public libraries", "lightning", "cotton",
    "the Vikings", "yoga", "satellites", "salt", "meditation", "the periodic table", "gardening in small spaces",
    "recycling", "the Industrial Revolution", "opera", "hummingbirds", "nuclear energy", "the Amazon rainforest",
    "photography", "blood pressure", "castles", "coffee", "sharks", "perfume",
)  # fmt: skip
_ABOUT = (
    "Explain {} in simple terms.", "Give me five facts about {}.", "Write a short essay about {}.",
    "What should a beginner know about {}?", "Write a short poem about {}.", "Why do people care about {}?",
    "Write a quiz of four questions and answers about {}.", "Describe the history of {} in one paragraph.",
    "How would you explain {} to a child?", "Write the introduction of an article on {}.",
    "List common mistakes that people make when they talk about {}.", "Tell me a story in which {} matters.",
)  # fmt: skip
_PROGRAMS = (
    "computes the factorial of a number", "sorts a list of numbers with bubble sort",
    "reverses the words of a sentence", "checks whether a number is prime", "merges two sorted lists",
    "converts Celsius to Fahrenheit", "finds the greatest common divisor of two numbers",
    "removes duplicates from a list and keeps the order", "counts the vowels of a string",
    "computes Fibonacci numbers", "performs a binary search", "transposes a matrix given as a list of lists",
    "flattens a nested list", "parses a date such as 2024-05-17", "generates a random password",
    "groups words by their first letter", "computes the median of a list", "checks whether brackets are balanced",
    "downloads a web page and prints its title", "writes a dictionary to JSON", "rotates a list by k places",
    "finds all anagrams in a list of words", "computes the sum of the digits of a number",
    "implements a queue with two lists", "draws a triangle of asterisks", "validates an e-mail address",
    "finds the longest common prefix of some strings", "simulates rolling two dice",
    "encrypts a text with a Caesar cipher", "computes the distance between two points", "lists the files of a folder",
    "multiplies two matrices",
)  # fmt: skip
_CODE = (
    "Write a Python function that {}.", "Write a Python program that {}, with comments.",
    "Show me how to write code that {}, and explain it step by step.", "Write a JavaScript function that {}.",
    "Write a Python function that {}, and three tests for it.", "What is the best way to write a function that {}?",
)  # fmt: skip
_OCCASIONS = (
    "a late delivery of furniture", "a job in a bakery", "a cancelled flight", "a birthday party in the park",
    "a lost umbrella", "a request for a day off", "a noisy dog", "an apprenticeship as a carpenter",
    "a wedding invitation", "a donation to an animal shelter", "a wrong bill for electricity",
    "a school trip to the zoo", "a new colleague", "a broken washing machine", "a course in Spanish",
    "a recommendation for a former student", "a hotel reservation", "an apology for a missed appointment",
    "a book club", "the end of a rental contract",
)  # fmt: skip
_LETTERS = (
    "Write a letter about {}.", "Write a polite e-mail about {}.", "Draft a short message to a friend about {}.",
    "Help me to write a formal request concerning {}.", "Write a phone conversation about {}.",
)  # fmt: skip
_TASKS = (
    "save money every month", "learn to swim as an adult", "prepare for a job interview", "clean a leather sofa",
    "train a puppy", "plan a vegetable garden", "fall asleep faster", "bake a birthday cake", "paint a room",
    "organise a move to another city", "read more books", "cook rice", "remove a red wine stain",
    "start a small company", "learn the guitar", "give a speech", "stay healthy in winter", "build a birdhouse",
    "write a curriculum vitae", "take better pictures", "run five kilometres", "choose a laptop", "deal with stress",
    "pack a suitcase",
)  # fmt: skip
_ADVICE = (
    "How can I {}?", "Give me seven tips on how to {}.", "Describe step by step how to {}.",
    "What do I need if I want to {}?", "Make a plan for four weeks for somebody who wants to {}.",
    "Write a friendly dialogue in which somebody learns how to {}.",
)  # fmt: skip


def training_prompts(count: int, seed: int = 0) -> list[str]:
    """Prompts to train a draft on, each a pattern with a subject, shuffled; those behind the last one begin anew."""
    pairs = ((_ABOUT, _SUBJECTS), (_CODE, _PROGRAMS), (_LETTERS, _OCCASIONS), (_ADVICE, _TASKS))
    every = [pattern.format(subject) for patterns, subjects in pairs for pattern in patterns for subject in subjects]
    random.Random(seed).shuffle(every)
    return [every[index % len(every)] for index in range(count)]

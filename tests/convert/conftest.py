from tests.helpers.fixtures import seeded as seeded
